"""What removing dead units at the end of every round is worth, against keeping them as zeros until training is over.

    python benchmarks/shrink.py --root FOLDER [--model FILE]   FOLDER holds train/<class>/… of 32×32 images

Two whole pruning runs to a quarter of the MACs, alike but for the moment of removal: same model, data, rounds, epochs.
Without a file the model starts from random weights. One after the other, so wall seconds suffer from whatever else the
machine does; seconds of CPU time suffer less.
"""

import argparse
import copy
import time
from collections.abc import Generator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import print_table, save

import dpm_cli
from dpm_cli.events import Event
from dpm_cli.graph import compact_
from dpm_cli.graph.program import Example
from dpm_cli.method.pruners.depgraph import GroupImportance
from dpm_cli.method.pruning import Choice, Pruning, Removal
from dpm_cli.models import build
from dpm_cli.recipe.stages import Stage
from dpm_cli.run.story import Run

ROUNDS, END = 3, 0.2  # the last round is over after this fraction of the training
BATCH, VALIDATION = 128, 0.1


class LatePruning(Pruning):
    """Dead units stay in the network as zeros until `remove_late`. All decisions are those of early removal."""

    is_late = True  # nothing was removed yet

    @property
    def is_met(self) -> bool:
        return self._would_meet(self._present)

    @property
    def is_done(self) -> bool:
        return not self.is_late and super().is_done

    def is_due(self, step: int) -> bool:
        return super().is_due(step) and not (self.round >= len(self.rounds.starts) and self.is_met)

    def start_round(self) -> Choice:
        """By the importances of what is still alive, as if the rest were gone."""
        present = self._present
        shadow = copy.deepcopy(self.model)
        compact_(shadow, self.groups, present)
        scores = np.full(len(present), np.inf)
        scores[present] = GroupImportance(self.groups.survivors(present), shadow).scores("mean")
        with patch.object(self.base, "scores", lambda: scores):
            return super().start_round()

    def finish_round(self, example: Example) -> Removal:
        self.in_round = False
        released = int(self.decay.released.sum())
        self.released += released
        return Removal(0, released, 0.0, {}, {})

    def after_step_(self, step: int, lr: float) -> None:
        super().after_step_(step, lr)
        self.units.scale_(torch.where(self.decay.dead, 0.0, 1.0))  # momentum goes on pushing them

    def remove_late(self, example: Example) -> Removal:
        self.is_late = False
        return self.remove_dead(example)


class LateRun(Run):
    def _train(self, stage: Stage) -> Generator[Event, None, None]:
        yield from super()._train(stage)
        subject = self.subject
        if isinstance(subject.pruning, LatePruning) and stage is subject.stages[-1]:
            removal = subject.pruning.remove_late(self.setup.check_images())
            subject.model.to(memory_format=subject.layout)
            subject.difference = removal.difference


def prune(
    root: Path, arch: str, weights: Path | None, epochs: int, limit: int, seed: int, *, late: bool
) -> dict[str, Any]:
    steps = epochs * (int((1 - VALIDATION) * limit) // BATCH)
    recipe = {
        "model": {"arch": arch},
        "data": {"name": "folder", "root": str(root), "limit": limit, "batch": BATCH, "validation": VALIDATION},
        "prune": {"target": {"macs": 0.25}, "rounds": ROUNDS, "end": END},
        "decay": {"steps": int(END * steps) // ROUNDS},
        "train": {"epochs": epochs, "lr": 0.05},
        "finetune": {"epochs": 0},
        "export": [],
        "seed": seed,
    }
    torch.manual_seed(seed)
    model = weights or build(arch, classes=10, shape=(3, 32, 32))
    kinds = (LateRun, LatePruning) if late else (Run, Pruning)
    started, started_cpu = time.monotonic(), time.process_time()
    with (
        TemporaryDirectory() as folder,
        patch("dpm_cli.jobs.prune.Run", kinds[0]),
        patch("dpm_cli.run.subject.Pruning", kinds[1]),
    ):
        report = dpm_cli.prune(model, recipe, output=folder)
    return {
        "model": arch,
        "seed": seed,
        "removal": "at the end" if late else "every round",
        "seconds": time.monotonic() - started,
        "training seconds": report.seconds["train"],
        "CPU seconds": time.process_time() - started_cpu,
        "MACs left": report.slim.macs / report.dense.macs,
        "validation": report.validation_accuracy,
        "test": report.slim.accuracy,
        "difference at removal": report.compact_difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--arch", default="vgg16_bn")
    parser.add_argument("--model", type=Path, help="trained weights of --arch")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--limit", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        for late in (False, True):
            rows.append(
                prune(
                    arguments.root, arguments.arch, arguments.model, arguments.epochs, arguments.limit, seed, late=late
                )
            )
        early, last = rows[-2:]
        for row in (early, last):
            row["of the time"] = row["seconds"] / last["seconds"]
            row["of the CPU time"] = row["CPU seconds"] / last["CPU seconds"]
    print_table(rows)
    save(
        f"shrink-{arguments.arch}", rows, epochs=arguments.epochs, limit=arguments.limit, trained=bool(arguments.model)
    )


if __name__ == "__main__":
    main()

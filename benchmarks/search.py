"""What the defaults leave open, tried on tuning seeds and judged on validation images; the test set plays no part.

    python benchmarks/search.py --data CIFAR10_FOLDER --work runs            trains what is missing, prints the table
    python benchmarks/search.py --data CIFAR10_FOLDER --work runs --table    only prints and writes it

DepGraph with Smooth Pruning and a teacher, in the CPU scale of `paired.py` and from the dense nets that it leaves in
`--work`: one setting changed at a time. Seeds begin where those of `paired.py` do not reach. The dense nets have seen
the images that are held out here, so these accuracies compare with each other only. Interrupted, it goes on where it
was; several processes share the work.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import print_table, save
from paired import Trial, compare, fill, make_recipe
from scales import SCALES, Net

import dpm_cli

SCALE, HELD_OUT = SCALES["cpu"], 0.1
FIRST_SEED = 200
STEPS = SCALE.epochs * ((SCALE.images or 50_000) // 128)


def spans(first: int, last: int) -> dict[str, float]:
    """All rounds: the first is chosen at step `first`, the last is dead at step `last`."""
    return {"prune.start": first / STEPS, "prune.end": (last + 1) / STEPS}


SETTINGS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "teacher's weight 0.5": {"train.distill": 0.5},
    "teacher's weight 0.9": {"train.distill": 0.9},
    "temperature 2": {"train.temperature": 2.0},
    "temperature 8": {"train.temperature": 8.0},
    "learning rate 0.02": {"train.lr": 0.02},
    "learning rate 0.1": {"train.lr": 0.1},
    "3 rounds of 70 steps": {"prune.rounds": 3, **spans(0, 210)},
    "decay over 35 steps": {"decay.steps": 35, **spans(0, 35)},
    "decay over 140 steps": {"decay.steps": 140, **spans(0, 140)},
    "importance fisher": {"prune.importance": "fisher", **spans(0, 70)},
    "importance taylor": {"prune.importance": "taylor", **spans(0, 70)},
}


@dataclass(frozen=True)
class Attempt:
    """One run: a setting at a budget, from one dense net, with one seed."""

    setting: str
    budget: float
    net: Net
    seed: int

    @property
    def folder(self) -> str:
        words = re.sub("[^a-zA-Z0-9.]+", "-", self.setting)
        return f"search-{words}-{self.budget:g}-net{self.net.seed}-{self.seed}"

    def recipe(self, data: Path) -> dict[str, Any]:
        recipe = make_recipe(SCALE, data, Trial("depgraph", "+ SP, distilled", self.budget, self.net, self.seed))
        recipe["data"] |= {"validation": HELD_OUT, "limit": math.ceil((SCALE.images or 50_000) / (1 - HELD_OUT))}
        for key, value in SETTINGS[self.setting].items():
            section, _, name = key.partition(".")
            recipe[section] |= {name: value}
        return recipe

    def read(self, work: Path) -> dict[str, Any] | None:
        path = work / self.folder / "report.json"
        if not path.exists():
            return None
        report = json.loads(path.read_text())
        return {
            "setting": self.setting,
            "budget": self.budget,
            "net": self.net.seed,
            "seed": self.seed,
            "validation": report["validation_accuracy"],
            "macs": report["slim"]["macs"] / report["dense"]["macs"],
        }


def list_attempts(settings: Sequence[str], budgets: Sequence[float], seeds: int) -> Iterator[Attempt]:
    """Seed by seed, so that a table can be made early."""
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for budget in budgets:
            for setting in settings:
                for net in SCALE.nets:
                    yield Attempt(setting, budget, net, seed)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per budget and setting: the mean, and the paired differences to the defaults."""
    table = []
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        at_budget = [row for row in rows if row["budget"] == budget]
        by_setting = {
            setting: {(row["net"], row["seed"]): row for row in at_budget if row["setting"] == setting}
            for setting in SETTINGS
        }
        reference = by_setting["the defaults"]
        for setting, mine in by_setting.items():
            if mine.keys() & reference.keys():
                table.append(
                    {
                        "kept MACs": f"{budget:.0%}",
                        "setting": setting,
                        "validation %": f"{statistics.mean(row['validation'] for row in mine.values()):.2f}",
                        "difference": compare(mine, reference, setting == "the defaults", of="validation"),
                        "runs": len(mine),
                    }
                )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--work", type=Path, required=True, help="where runs and the dense checkpoints are kept")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--budgets", nargs="+", type=float, choices=SCALE.budgets, default=SCALE.budgets)
    parser.add_argument("--seeds", type=int, default=1, help="on each dense net")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work, rows = arguments.work, []
    for attempt in list_attempts(arguments.settings, arguments.budgets, arguments.seeds):
        if not arguments.table:
            dense, folder = work / f"{SCALE.arch}-{attempt.net.seed}.pt", work / attempt.folder
            fill(folder, partial(dpm_cli.prune, dense, attempt.recipe(arguments.data), output=folder, resume=True))
        rows += [row] if (row := attempt.read(work)) else []
    if table := summarise(rows):
        print_table(table)
        save("search_cpu", rows, settings=SETTINGS, scale=repr(SCALE))


if __name__ == "__main__":
    main()

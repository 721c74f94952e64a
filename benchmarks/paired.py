"""What DPM adds to each base pruner: base, + Smooth Pruning, + Self-Rectifying, on paired seeds.

python benchmarks/paired.py --data CIFAR10_FOLDER --work runs                 trains what is missing, prints the tables
python benchmarks/paired.py --data CIFAR10_FOLDER --work runs --table         only prints and writes them

Every arm starts from the same dense checkpoint, has the same number of epochs and the same MAC target, and sees the
same images in the same order for a seed. What is compared is the accuracy of the last weights on the test images, which
nothing looks at before. Interrupted, it goes on where it was; several processes share the work. The folder has the
layout train/<class>/*, test/<class>/*; the published numbers use CIFAR-10.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import print_table, save
from scipy.stats import t as student
from soft import prune_softly

import dpm_cli
from dpm_cli.errors import OutputError

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]


@dataclass(frozen=True)
class Scale:
    """How much of it fits the machine."""

    arch: str
    images: int | None
    dense_epochs: int
    epochs: int
    decay_steps: int
    budgets: tuple[float, ...]
    seeds: int


SCALES = {
    "cpu": Scale("resnet20", 10_000, 20, epochs=6, decay_steps=70, budgets=(0.5, 0.25), seeds=5),
    "gpu": Scale("resnet56", None, 160, epochs=60, decay_steps=1000, budgets=(0.47, 0.25), seeds=5),
    "gpu-vgg16": Scale("vgg16_bn", None, 160, epochs=60, decay_steps=1000, budgets=(0.265, 0.1), seeds=5),
}
RELEASE = {"criterion": "significance", "rate": 2.0, "length": 1.0, "start": 0.3}
ARMS = {
    "depgraph": ("base", "base, cut at once", "+ SP", "+ SP + SR"),
    "depgraph, mixed": ("base", "+ SP"),
    "otov2": ("base", "+ SP", "+ SP + SR"),
    "gate-decorator": ("base", "+ SP", "+ SP + SR"),
    "soft": ("SFP", "ASFP"),
}


@dataclass(frozen=True)
class Trial:
    """One run of the matrix."""

    base: str
    arm: str
    budget: float
    seed: int

    @property
    def folder(self) -> str:
        words = f"{self.base}-{self.arm}-{self.budget:g}-{self.seed}".replace("+ ", "").replace(",", "")
        return words.replace(" ", "-")


def list_trials(scale: Scale, bases: Sequence[str]) -> Iterator[Trial]:
    """Seed by seed, so that a table can be made early."""
    for seed in range(scale.seeds):
        for budget in scale.budgets:
            for base in bases:
                for arm in ARMS[base]:
                    yield Trial(base, arm, budget, seed)


def make_recipe(scale: Scale, data: Path, trial: Trial) -> dict[str, Any]:
    """The method's own stages within `scale.epochs`; units are all dead at the same step in every arm."""
    per_epoch = (scale.images or 50_000) // 128
    steps, smooth = scale.epochs * per_epoch, "SP" in trial.arm
    decay_steps = scale.decay_steps if smooth else 1
    prune: dict[str, Any] = {
        "base": trial.base.partition(",")[0],
        "target": {"macs": trial.budget},
        "round_to": 1,
        "rounds": 1,
    }
    train: dict[str, Any] = {"epochs": scale.epochs, "lr": 0.05}
    finetune: dict[str, Any] = {"epochs": 0}
    match prune["base"]:
        case "depgraph":
            observed = 0
            if "mixed" in trial.base:
                prune["importance"] = "mixed"
                observed = 50
            cut = 0 if "at once" in trial.arm else scale.decay_steps  # the step from which on nothing more is removed
            prune["start"] = observed / steps if smooth else (observed + cut) / steps
            prune["end"] = (observed + scale.decay_steps + 1) / steps
        case "otov2":
            prune["end"] = 0.4
        case "gate-decorator":
            prune["rounds"] = 2  # ticks of one epoch; a tock of a quarter of the rest before and after
            decay_steps = max(1, decay_steps // 2)  # two decays must fit into the last tock
            train["epochs"] = max(1, (scale.epochs - 2) // 4)
            train["schedule"] = "triangular"
            finetune = {"epochs": scale.epochs - 2 - 2 * train["epochs"], "lr": 0.05}
    return {
        "model": {"arch": scale.arch, "classes": 10, "input": [3, 32, 32]},
        "data": {
            "name": "folder", "root": str(data), "batch": 128, "validation": 0, "limit": scale.images,
            "mean": MEAN, "std": STD,
        },
        "prune": prune,
        "decay": {"steps": decay_steps, "rectify": RELEASE if "SR" in trial.arm else False},
        "train": train,
        "finetune": finetune,
        "export": [],
        "checkpoint": {"every": 200},
        "seed": trial.seed,
    }  # fmt: skip


def run(trial: Trial, scale: Scale, data: Path, dense: Path, folder: Path) -> None:
    recipe = make_recipe(
        scale, data, trial if trial.base != "soft" else Trial("depgraph", "base", trial.budget, trial.seed)
    )
    if trial.base == "soft":
        prune_softly(dense, recipe, epochs=scale.epochs, asymptotic=trial.arm == "ASFP", output=folder)
    else:
        dpm_cli.prune(dense, recipe, output=folder, resume=True)


def fill(folder: Path, run: Callable[[], object]) -> bool:
    """Run what writes a report into a folder, unless it is there or another process is at it. Whether it ran."""
    if (folder / "report.json").exists():
        return False
    try:
        run()
    except OutputError as error:
        print(f"{folder.name}: {error}", flush=True)
        return False
    return True


def read(trial: Trial, work: Path) -> dict[str, Any] | None:
    path = work / trial.folder / "report.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    return {
        "base": trial.base,
        "arm": trial.arm,
        "budget": trial.budget,
        "seed": trial.seed,
        "accuracy": report["slim"]["accuracy"],
        "dense_accuracy": report["dense"]["accuracy"],
        "macs": report["slim"]["macs"] / report["dense"]["macs"],
        "params": report["slim"]["params"] / report["dense"]["params"],
        "released": report["units"]["released"],
        "seconds": round(sum(spent for stage, spent in report["seconds"].items() if stage != "measure"), 1),
    }


def interval(differences: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean (Student's t)."""
    n = len(differences)
    return float(student.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per base, budget and arm: the mean, and the paired differences to that base's first arm."""
    table = []
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        for base, arms in ARMS.items():
            own = [row for row in rows if row["base"] == base and row["budget"] == budget]
            reference_base, reference_arm = ("depgraph", "base") if base == "soft" else (base, arms[0])
            reference = {
                row["seed"]: row["accuracy"]
                for row in rows
                if (row["base"], row["arm"], row["budget"]) == (reference_base, reference_arm, budget)
            }
            for arm in arms:
                mine = {row["seed"]: row for row in own if row["arm"] == arm}
                if not mine:
                    continue
                paired = [row["accuracy"] - reference[seed] for seed, row in mine.items() if seed in reference]
                is_reference = (base, arm) == (reference_base, reference_arm)
                table.append(
                    {
                        "kept MACs": f"{statistics.mean(row['macs'] for row in mine.values()):.1%}",
                        "base": base,
                        "arm": arm,
                        "accuracy %": f"{statistics.mean(row['accuracy'] for row in mine.values()):.2f}",
                        "difference": ""
                        if is_reference or not paired
                        else f"{statistics.mean(paired):+.2f} ± {interval(paired):.2f}",
                        "sd": "" if is_reference or len(paired) < 2 else f"{statistics.stdev(paired):.2f}",
                        "seeds": len(mine),
                        "kept parameters": f"{statistics.mean(row['params'] for row in mine.values()):.1%}",
                        "released": f"{statistics.mean(row['released'] for row in mine.values()):.1f}",
                        "seconds": f"{statistics.median(row['seconds'] for row in mine.values()):.0f}",
                    }
                )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--work", type=Path, required=True, help="where runs and the dense checkpoint are kept")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--bases", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, help="fewer or more than the scale's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scale, work = SCALES[arguments.scale], arguments.work
    if arguments.seeds:
        scale = Scale(**{**vars(scale), "seeds": arguments.seeds})
    trials = list(list_trials(scale, arguments.bases))
    dense = work / f"{scale.arch}.pt"
    work.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        if not dense.exists():
            recipe = make_recipe(scale, arguments.data, trials[0])
            recipe["data"] |= {"limit": None}
            recipe["dense"] = {"epochs": scale.dense_epochs, "lr": 0.1, "nesterov": True, "warmup_epochs": 1}
            dpm_cli.train(recipe, output=dense)
        for trial in trials:
            folder = work / trial.folder
            if fill(folder, partial(run, trial, scale, arguments.data, dense, folder)):
                print(json.dumps(read(trial, work)), flush=True)
    rows = [row for trial in trials if (row := read(trial, work))]
    if rows:
        print_table(summarise(rows))
        settings = {"scale": {**vars(scale)}, "release": RELEASE, "threads": arguments.threads}
        save(f"paired_{arguments.scale}", rows, **settings)


if __name__ == "__main__":
    main()

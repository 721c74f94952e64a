"""What each part adds to each base pruner, on paired dense nets and seeds: Smooth Pruning, distillation, rectifying.

python benchmarks/paired.py --data CIFAR10_FOLDER --work runs                 trains what is missing, prints the tables
python benchmarks/paired.py --data CIFAR10_FOLDER --work runs --table         only prints and writes them

All arms start from the same dense nets (of different seeds and lengths) and have the same number of epochs, but for one
that has as many seconds as the defaults, and the same MAC target; they see the same images in the same order for a
seed. What is compared is the accuracy of the last weights on the test images, which nothing looks at before.
Interrupted, it goes on where it was; several processes share the work. Rows that benchmarks/results has of the same
settings are kept, and not measured again. The folder has the layout train/<class>/*, test/<class>/*; the published
numbers use CIFAR-10.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from baselines import Baseline, run_baseline
from common import print_table, read_rows, save
from scales import SCALES, Net, Scale
from scipy.stats import t as student

import dpm_cli
from dpm_cli.errors import OutputError

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]


RELEASE = {"criterion": "significance", "rate": 2.0, "length": 1.0, "start": 0.3}
DISTILL = 0.7
HESSO_PERIODS = 5  # the reference has 10 in hundreds of epochs


@dataclass(frozen=True)
class Arm:
    """What is switched on besides the base pruner."""

    smooth: bool = False  # units decay over `Scale.decay_steps`; else they are cut in one step
    distill: float = 0.0
    rectify: Mapping[str, Any] | None = None
    late: bool = False  # depgraph: cut at the step at which a decay would end, not at the first
    importance: str = "group-norm"  # depgraph
    hesso: bool = False  # otov2: HESSO's own selection, periods and way to zero
    baseline: Baseline | None = None  # nothing of ours but the groups and the exact target
    length: float = 1.0  # × the scale's epochs: to compare at equal time
    round_to: int = 1  # multiples of this
    end: float | None = None  # of the train stage
    steps: int | None = None  # depgraph: of a decay until `end`
    rounds: int = 1
    stages: int = 1  # depgraph: of equal length; in the second the slim net is finetuned
    lr: float = 0.05  # depgraph, otov2
    tock: str = "triangular"  # gate-decorator: schedule of a tock's rate


CUT, SMOOTH = Arm(), Arm(smooth=True)
EARLY = replace(SMOOTH, distill=DISTILL, end=0.2, steps=56)
SHORT = {
    "cut": CUT,
    "cut, distilled": replace(CUT, distill=DISTILL),
    "+ SP, distilled": replace(SMOOTH, distill=DISTILL),
    "+ SP + SR, distilled": replace(SMOOTH, distill=DISTILL, rectify=RELEASE),
}
ARMS = {
    "depgraph": {
        **SHORT,
        "cut, longer": replace(CUT, length=5 / 3),  # as many seconds as the defaults take
        "cut, in fours": replace(CUT, round_to=4),
        "cut, in eights": replace(CUT, round_to=8),
        "+ SP": SMOOTH,
        "+ SP to 0.2, distilled": EARLY,
        "+ SP to 0.4 of two stages, distilled": replace(EARLY, end=0.4, stages=2),
        "+ SP in rounds to 0.2, distilled": replace(EARLY, rounds=3, steps=18),
        "+ SP in rounds to 0.5, distilled": replace(EARLY, end=0.5, rounds=5, steps=27),
        "+ SP in rounds to 0.5 of two stages, distilled": replace(EARLY, end=0.5, rounds=3, steps=23, stages=2),
        "+ SP + reselect, distilled": replace(SMOOTH, distill=DISTILL, rectify={"criterion": "reselect"}),
        "+ SP, distilled, at a fifth of the rate": replace(SMOOTH, distill=DISTILL, lr=0.01),
        "late cut, distilled": replace(CUT, distill=DISTILL, late=True),
        "fisher, cut, distilled": replace(CUT, distill=DISTILL, importance="fisher"),
        "fisher + SP, distilled": replace(SMOOTH, distill=DISTILL, importance="fisher"),
        **{name: Arm(baseline=name) for name in get_args(Baseline)},
    },
    "otov2": {
        **SHORT,
        "+ SP to 0.2, distilled": EARLY,
        "HESSO": Arm(smooth=True, hesso=True),
    },
    "gate-decorator": {name: replace(arm, rounds=2) for name, arm in SHORT.items()}
    | {
        f"{name}, in one round{words}": replace(SHORT[name], tock=schedule)
        for words, schedule in (("", "triangular"), (", cosine", "cosine"))
        for name in ("cut, distilled", "+ SP, distilled")
    },
}
REFERENCES = ("cut", "cut, distilled")


@dataclass(frozen=True)
class Trial:
    """One run of the matrix."""

    base: str
    arm: str
    budget: float
    net: Net
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What `key_of` gives of its row."""
        return self.budget, self.base, self.arm, self.net.seed, self.seed

    @property
    def folder(self) -> str:
        words = f"{self.base}-{self.arm}-{self.budget:g}-net{self.net.seed}-{self.seed}"
        return words.replace("+ ", "").replace(",", "").replace(" ", "-")


def list_trials(scale: Scale, bases: Sequence[str], arms: Sequence[str]) -> Iterator[Trial]:
    """Seed by seed, so that a table can be made early. Seeds of runs are not those of dense nets."""
    for seed in range(100, 100 + scale.seeds):
        for budget in scale.budgets:
            for net in scale.nets:
                for base in bases:
                    for arm in ARMS[base]:
                        if not arms or arm in arms:
                            yield Trial(base, arm, budget, net, seed)


def make_recipe(scale: Scale, data: Path, trial: Trial) -> dict[str, Any]:
    """The method's own stages within the arm's epochs; decays end at the same step in every arm."""
    arm, per_epoch = ARMS[trial.base][trial.arm], (scale.images or 50_000) // 128
    epochs = round(scale.epochs * arm.length)
    steps = epochs * per_epoch
    prune: dict[str, Any] = {
        "base": trial.base,
        "target": {"macs": trial.budget},
        "round_to": arm.round_to,
        "rounds": arm.rounds,
    }
    train: dict[str, Any] = {"epochs": epochs, "lr": arm.lr, "distill": arm.distill}
    decay: dict[str, Any] = {"steps": scale.decay_steps if arm.smooth else 1, "rectify": arm.rectify or False}
    finetune: dict[str, Any] = {"epochs": 0}
    match trial.base:
        case "depgraph":
            prune["importance"] = arm.importance
            prune["start"] = (scale.decay_steps if arm.late else 0) / steps
            prune["end"] = (scale.decay_steps + 1) / steps
            if arm.end is not None:
                prune["end"], decay["steps"] = arm.end, arm.steps
            train["epochs"] = epochs // arm.stages
            finetune = train | {"epochs": epochs - train["epochs"]}
        case "otov2":
            prune["end"] = arm.end or 0.4
            if arm.hesso:
                periods = min(HESSO_PERIODS, scale.decay_steps)
                prune |= {"rounds": periods, "otov2": {"variant": "hesso"}}
                decay |= {"steps": scale.decay_steps // periods, "envelope": "multiplicative"}
        case "gate-decorator":
            ticks = prune["rounds"]  # of one epoch; a tock of a quarter of the rest before and after
            decay["steps"] = max(1, decay["steps"] // 2)  # two decays must fit into the last tock
            train["epochs"] = max(1, (epochs - ticks) // 4)
            train["schedule"] = arm.tock
            finetune = {"epochs": epochs - ticks - 2 * train["epochs"], "lr": 0.05, "distill": arm.distill}
    return {
        "model": {"arch": scale.arch, "classes": 10, "input": [3, 32, 32]},
        "data": {
            "name": "folder", "root": str(data), "batch": 128, "validation": 0, "limit": scale.images,
            "mean": MEAN, "std": STD,
        },
        "prune": prune,
        "decay": decay,
        "train": train,
        "finetune": finetune,
        "export": [],
        "checkpoint": {"every": 200},
        "seed": trial.seed,
    }  # fmt: skip


def train_net(net: Net, scale: Scale, data: Path, path: Path) -> None:
    recipe = make_recipe(scale, data, Trial("depgraph", "cut", scale.budgets[0], net, net.seed))
    recipe["data"] |= {"limit": None}
    recipe["dense"] = {"epochs": net.epochs, "lr": 0.1, "nesterov": True, "warmup_epochs": min(1, net.epochs / 2)}
    while not path.exists():
        try:
            dpm_cli.train(recipe, output=path, resume=True, trust=True)
        except OutputError as error:
            if "in use" not in str(error):
                raise
            time.sleep(1)  # another process is at it


def run(trial: Trial, scale: Scale, data: Path, dense: Path, folder: Path) -> None:
    recipe = make_recipe(scale, data, trial)
    if baseline := ARMS[trial.base][trial.arm].baseline:
        run_baseline(baseline, dense, recipe, epochs=scale.epochs, output=folder)
    else:
        dpm_cli.prune(dense, recipe, output=folder, resume=True, trust=True)


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
        "net": trial.net.seed,
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
    """One line per budget, base and arm: the mean, and the paired differences to the base's cuts."""
    table = []
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        for base, arms in ARMS.items():
            by_arm = {
                arm: {key_of(row)[3:]: row for row in rows if key_of(row)[:3] == (budget, base, arm)} for arm in arms
            }
            for arm, mine in by_arm.items():
                if not mine:
                    continue
                table.append(
                    {
                        "kept MACs": f"{statistics.mean(row['macs'] for row in mine.values()):.1%}",
                        "base": base,
                        "arm": arm,
                        "accuracy %": f"{statistics.mean(row['accuracy'] for row in mine.values()):.2f}",
                        **{f"against {name}": compare(mine, by_arm.get(name, {}), arm == name) for name in REFERENCES},
                        "runs": len(mine),
                        "kept parameters": f"{statistics.mean(row['params'] for row in mine.values()):.1%}",
                        "released": f"{statistics.mean(row['released'] for row in mine.values()):.1f}",
                        "seconds": f"{statistics.median(row['seconds'] for row in mine.values()):.0f}",
                    }
                )
    return table


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The trial of a row; what comes after its arm is what two trials share that are compared."""
    return tuple(row[column] for column in ("budget", "base", "arm", "net", "seed"))


def compare(
    mine: Mapping[Any, Mapping[str, Any]],
    reference: Mapping[Any, Mapping[str, Any]],
    is_same: bool,
    of: str = "accuracy",
) -> str:
    """The mean of the paired differences in points, with its 95 % interval. of: the key of the rows to compare."""
    return "" if is_same else show([row[of] - reference[pair][of] for pair, row in mine.items() if pair in reference])


def show(differences: Sequence[float]) -> str:
    """The mean in points with its 95 % interval; nothing of nothing."""
    return f"{statistics.mean(differences):+.2f} ± {interval(differences):.2f}" if differences else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument(
        "--work", type=Path, required=True, help="where runs and dense checkpoints of this scale are kept"
    )
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--bases", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--arms", nargs="+", default=[], help="only these; default: all")
    parser.add_argument("--budgets", nargs="+", type=float, help="only these shares of the MACs")
    parser.add_argument("--seeds", type=int, help="fewer or more than the scale's own")
    parser.add_argument("--epochs", type=int, help="of every pruning run, in place of the scale's own")
    parser.add_argument("--dense-epochs", type=int, help="of every dense net, in place of the scale's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scale, work = SCALES[arguments.scale], arguments.work
    if arguments.seeds:
        scale = replace(scale, seeds=arguments.seeds)
    if arguments.epochs:
        steps = arguments.epochs * ((scale.images or 50_000) // 128)
        decay_steps = min(scale.decay_steps, steps // 4)  # a scale's own decays take a fifth of a cifar run or less
        scale = replace(scale, epochs=arguments.epochs, decay_steps=decay_steps)
    if arguments.dense_epochs:
        scale = replace(scale, nets=tuple(replace(net, epochs=arguments.dense_epochs) for net in scale.nets))
    name = f"paired_{arguments.scale}"
    settings = {
        "scale": repr(replace(scale, seeds=SCALES[arguments.scale].seeds)),
        "release": RELEASE,
        "distill": DISTILL,
    }

    def collect() -> list[dict[str, Any]]:
        """The rows of benchmarks/results, and over them what this work folder has of the trials."""
        here = [row for trial in trials if (row := read(trial, work))]
        return list({key_of(row): row for row in [*read_rows(name, **settings), *here]}.values())

    asked = replace(scale, budgets=tuple(arguments.budgets or scale.budgets))
    trials = list(list_trials(asked, arguments.bases, arguments.arms))
    known = {key_of(row) for row in collect()}
    missing = [trial for trial in trials if trial.key not in known] if not arguments.table else []
    work.mkdir(parents=True, exist_ok=True)
    dense = {net: work / f"{scale.arch.partition(':')[0]}-{net.seed}.pt" for net in scale.nets}
    for net in {trial.net: None for trial in missing}:
        if not dense[net].exists():
            train_net(net, scale, arguments.data, dense[net])
    for trial in missing:
        folder = work / trial.folder
        if fill(folder, partial(run, trial, scale, arguments.data, dense[trial.net], folder)):
            print(json.dumps(read(trial, work)), flush=True)
            save(name, collect(), **settings, threads=arguments.threads)
    if rows := collect():
        print_table(summarise(rows))
        save(name, rows, **settings, threads=arguments.threads)


if __name__ == "__main__":
    main()

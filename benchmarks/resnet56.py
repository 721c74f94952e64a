"""A trained ResNet-56 to 47 % of its MACs by the shipped recipe, against the dense net fine-tuned for as many epochs.

    python benchmarks/resnet56.py --model FILE --data CIFAR10_FOLDER --work runs            hours on a CPU
    python benchmarks/resnet56.py --model FILE --data CIFAR10_FOLDER --work runs --table    only prints and writes

The recipe is `resnet56-folder`; FOLDER holds train/<class>/* and test/<class>/*. Settings are chosen by validation
accuracy; the test images are read once, at the end of a run. Interrupted, it goes on where it was; several processes
share the work. Rows in benchmarks/results are kept, and not measured again.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import print_table, read_rows, save
from paired import fill, show

import dpm_cli

NAME = "resnet56_jpeg"
RECIPE = "resnet56-folder"
DENSE = "dense, fine-tuned"
FITTED = "fitted for an epoch, slim, the fitted model as teacher"
ONE_ROUND = ", in one round"
LOW = ", at a fifth of the rate"
FOURS = ", in fours"
ONCE = ["prune.rounds=1", "prune.end=0.2"]
ARMS: dict[str, list[str]] = {
    DENSE: [],
    DENSE + LOW: ["dense.lr=0.01"],
    "slim": [],
    "slim" + ONE_ROUND: ONCE,
    "slim" + ONE_ROUND + LOW: [*ONCE, "train.lr=0.01"],
    "slim, by Fisher" + ONE_ROUND + LOW: [*ONCE, "train.lr=0.01", "prune.importance=fisher"],
    "slim, by Fisher" + FOURS + ONE_ROUND + LOW: [
        *ONCE,
        "train.lr=0.01",
        "prune.importance=fisher",
        "prune.round_to=4",
    ],
    "slim, the dense model as teacher": ["train.distill=0.7"],
    FITTED: ["train.distill=0.7", "train.epochs=11"],
    FITTED + ONE_ROUND + LOW: ["train.distill=0.7", "train.epochs=11", *ONCE, "train.lr=0.01"],
}
FIT = ["dense.epochs=1", "dense.lr=0.01"]  # how the dense model is fitted to the images before it is pruned


def is_dense(arm: str) -> bool:
    return arm.startswith(DENSE)


def folder_of(arm: str, seed: int) -> str:
    return f"resnet56-{arm.replace(',', '').replace(' ', '-')}-{seed}"


def run(arm: str, seed: int, model: Path, data: Path, folder: Path) -> None:
    """Fill a folder with the report of a run; of the dense net, with what `dpm train` tells."""
    overrides = [f"data.root={data}", "checkpoint.every=100", f"seed={seed}", *ARMS[arm]]
    if arm.startswith(FITTED):
        fitted = folder.with_suffix(".pt")
        if not fitted.exists():
            dpm_cli.train(dpm_cli.load_recipe(RECIPE, [*overrides, *FIT]), model=model, output=fitted, resume=True)
        model = fitted
    recipe = dpm_cli.load_recipe(RECIPE, overrides)
    if not is_dense(arm):
        dpm_cli.prune(model, recipe, output=folder, resume=True)
        return
    folder.mkdir(exist_ok=True)
    trained = dpm_cli.train(recipe, model=model, output=folder / "dense.pt", resume=True)
    (folder / "report.json").write_text(json.dumps(trained.to_dict()))


def read(arm: str, seed: int, work: Path) -> dict[str, Any] | None:
    path = work / folder_of(arm, seed) / "report.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    slim = report if is_dense(arm) else report["slim"]
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": slim["accuracy"],
        "validation": report["validation_accuracy"],
        "macs": 1.0 if is_dense(arm) else slim["macs"] / report["dense"]["macs"],
        "params": slim["params"],
        "precision": report["precision"],
    }


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per arm: means over the seeds, and how far the test accuracy is from the mean of the dense nets.

    These are the ones that were fine-tuned at the arm's rate.
    """
    table = []
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        dense = [row["accuracy"] for row in rows if row["arm"] == (DENSE + LOW if arm.endswith(LOW) else DENSE)]
        apart = [row["accuracy"] - statistics.mean(dense) for row in mine] if dense and not is_dense(arm) else []
        table.append(
            {
                "": arm,
                "test accuracy %": f"{statistics.mean(row['accuracy'] for row in mine):.2f}",
                "validation %": f"{statistics.mean(row['validation'] for row in mine):.2f}",
                "against dense": show(apart),
                "kept MACs": f"{statistics.mean(row['macs'] for row in mine):.1%}",
                "parameters": round(statistics.mean(row["params"] for row in mine)),
                "seeds": len(mine),
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="weights of a ResNet-56 trained on CIFAR-10")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--work", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    trials = [(arm, seed) for seed in arguments.seeds for arm in arguments.arms]
    known = {(row["arm"], row["seed"]) for row in read_rows(NAME)}
    for arm, seed in trials:
        folder = work / folder_of(arm, seed)
        if not arguments.table and (arm, seed) not in known:
            fill(folder, partial(run, arm, seed, arguments.model, arguments.data, folder))
    here = [row for trial in trials if (row := read(*trial, work))]
    # Read again: another process may have added some.
    rows = list({(row["arm"], row["seed"]): row for row in [*read_rows(NAME), *here]}.values())
    if rows:
        print_table(summarise(rows))
        save(NAME, rows, recipe=RECIPE, arms=ARMS)


if __name__ == "__main__":
    main()

"""Does `target: {drop: 1.0}` deliver a net within one point of the dense one, and was one round further not?

    python benchmarks/drop.py digits --work runs                                     bundled digits, from training on
    python benchmarks/drop.py resnet20 --work runs --data FOLDER                     CIFAR-10 as JPEG files

All accuracies are on the validation images, which alone decide and which the dense net has not seen. "delivered" is of
the last weights; "one round further" is what the floor refused after the round that followed. Finished runs are kept
in the folder and not repeated.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import print_table, read_rows, save
from int8 import MEAN, STD

import dpm_cli
from dpm_cli.report import Report

NAME = "drop"
DROP = 1.0  # points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["digits", "resnet20"])
    parser.add_argument("--work", type=Path, required=True, help="where models and runs are kept")
    parser.add_argument("--data", type=Path, help="folder with train/ and test/")
    parser.add_argument("--dense", type=Path, help="weights of ResNet-20; without, it is trained")
    parser.add_argument("--dense-epochs", type=int, default=12, help="of ResNet-20, from scratch")
    parser.add_argument("--epochs", type=int, default=12, help="of ResNet-20, while rounds go on")
    parser.add_argument("--lr", type=float, default=0.01, help="of ResNet-20, at first")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    output = arguments.work / f"{arguments.case}-drop"
    prune = {"target": {"drop": DROP}, "rounds": arguments.rounds, "end": 0.9}
    if arguments.case == "digits":
        recipe: Any = dpm_cli.load_recipe("digits").model_dump() | {"export": []}
        recipe["prune"] = prune | {"round_to": 4}
        recipe["train"] |= {"epochs": 40, "lr": 0.01}  # at a high rate, accuracy jumps by more than a point
    else:
        data = {
            "name": "folder",
            "root": str(arguments.data),
            "batch": 64,
            "validation": 0.2,
            "mean": MEAN,
            "std": STD,
        }
        recipe = {
            "model": {"arch": "resnet20", "classes": 10, "input": [3, 32, 32]},
            "data": data,
            "prune": prune | {"round_to": 1},
            "dense": {"epochs": arguments.dense_epochs, "lr": 0.1, "nesterov": True, "warmup_epochs": 1},
            "train": {"epochs": arguments.epochs, "lr": arguments.lr},
            "finetune": {"epochs": 1, "lr": 0.002},
            "export": [],
        }
    dense = arguments.dense or arguments.work / f"{arguments.case}.pt"
    if not dense.exists():
        dpm_cli.train(recipe, output=dense, resume=True)
    report = dpm_cli.prune(dense, recipe, output=output, device="cpu", resume=True)
    rows = {each["case"]: each for each in read_rows(NAME)} | {arguments.case: describe(arguments.case, report, output)}
    print(f"written to {save(NAME, list(rows.values()))}")
    print_table([rows[arguments.case]])


def describe(case: str, report: Report, output: Path) -> dict[str, Any]:
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    backs = [event for event in events if event["event"] == "back"]
    assert report.floor is not None
    return {
        "case": case,
        "dense %": report.floor.dense,
        "floor %": report.floor.limit,
        "delivered %": report.validation_accuracy,
        "one round further %": backs[0]["validation_accuracy"] if backs else None,
        "within": report.validation_accuracy is not None and report.validation_accuracy >= report.floor.limit,
        "went back": len(backs),
        "MACs": report.slim.macs / report.dense.macs,
        "params": report.slim.params / report.dense.params,
        "test: dense %": report.dense.accuracy,
        "test: slim %": report.slim.accuracy,
    }


if __name__ == "__main__":
    main()

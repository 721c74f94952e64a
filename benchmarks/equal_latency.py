"""At equal latency and after equal training: is a latency target at least as accurate as a target in MACs?

    python benchmarks/equal_latency.py resnet56 --work runs --data FOLDER --dense resnet56.pt
    python benchmarks/equal_latency.py torchvision:mobilenet_v2 --work runs --data FOLDER --dense mobilenet.pt

First `target: {latency: SHARE}` is pruned and trained. Then the MAC target is looked for whose widths, by the same
table of operators, take as long; it is trained equally. Both files and the dense one are then measured in turns, so
the table says whether latency is equal ("taken", by dense, in processor time). All arms start from the same dense
weights, cut once at the first step and train on; a seed sets the order of the images. Accuracy is on the test images,
of the last weights. Finished runs are kept in the folder and not repeated.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_table, read_rows, save
from int8 import MEAN, STD

import dpm_cli
from dpm_cli.export import export_model
from dpm_cli.jobs.plan import Plan
from dpm_cli.method.budget import choose_victims
from dpm_cli.models import load_model
from dpm_cli.recipe import parse_recipe
from dpm_cli.report import Report

NAME = "equal-latency"
SHAPE = (3, 32, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", choices=["resnet56", "torchvision:mobilenet_v2"])
    parser.add_argument("--work", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--dense", type=Path, required=True, help="weights of the dense net")
    parser.add_argument("--share", type=float, default=0.6, help="of the dense latency")
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each file in all turns")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stem = arguments.arch.rpartition(":")[2]
    arguments.work.mkdir(parents=True, exist_ok=True)
    macs: float | None = None
    for seed in range(arguments.seeds):
        latency = prune(arguments, {"latency": arguments.share}, seed, arguments.work / f"{stem}-latency-{seed}")
        macs = macs or find_macs(arguments, latency)
        equal = prune(arguments, {"macs": macs}, seed, arguments.work / f"{stem}-macs-{seed}")
        row = compare(arguments, seed, latency, equal, stem)
        rows = {(each["model"], each["seed"]): each for each in read_rows(NAME)} | {(arguments.arch, seed): row}
        settings = {"images": arguments.images, "epochs": arguments.epochs, "share": arguments.share}
        print(f"written to {save(NAME, list(rows.values()), **settings)}", flush=True)
    own = [row for (model, _), row in rows.items() if model == arguments.arch]
    print_table(own)
    gains = [row["latency target %"] - row["MAC target %"] for row in own]
    print(f"latency target - MAC target: {statistics.mean(gains):+.2f} points, mean of {len(gains)} seeds")


def make_recipe(arguments: argparse.Namespace, target: dict[str, float], seed: int) -> dict[str, Any]:
    return {
        "model": {"arch": arguments.arch, "classes": 10, "input": list(SHAPE)},
        "data": {
            "name": "folder", "root": str(arguments.data), "batch": 64, "validation": 0.02, "limit": arguments.images,
            "mean": MEAN, "std": STD,
        },
        "prune": {"target": target, "rounds": 1},
        "decay": {"steps": 1},
        "train": {"epochs": arguments.epochs, "lr": 0.02},
        "finetune": {"epochs": 0},
        "export": ["onnx"],
        "seed": seed,
    }  # fmt: skip


def prune(arguments: argparse.Namespace, target: dict[str, float], seed: int, output: Path) -> Report:
    return dpm_cli.prune(
        str(arguments.dense), make_recipe(arguments, target, seed), output=output, device="cpu", resume=True
    )


def find_macs(arguments: argparse.Namespace, report: Report) -> float:
    """Find the share of the MACs whose widths take as long, by the table, as those that a latency target has left."""
    recipe = parse_recipe(make_recipe(arguments, {"latency": arguments.share}, 0))
    module = load_model(arguments.dense, arch=arguments.arch, classes=10, shape=SHAPE).module.eval()
    plan = Plan(module, recipe, torch.device("cpu"))
    (latency,) = plan.amounts
    after = {width.layer: width.after for width in report.widths}
    alive = np.zeros(plan.groups.units, bool)
    for group in plan.groups:
        alive[group.start : group.start + after[group.name] // group.channels_per_unit] = True
    allowed = latency.count(plan.groups.cost, alive)
    low, high = plan.lowest["macs"], plan.dense["macs"]
    while high - low > plan.dense["macs"] // 1000:
        middle = (low + high) // 2
        victims = choose_victims(plan.groups, plan.widths, plan.scores, kind="macs", limit=middle)
        low, high = (middle, high) if latency.count(plan.groups.cost, ~victims) <= allowed else (low, middle)
    return low / plan.dense["macs"]


def compare(arguments: argparse.Namespace, seed: int, latency: Report, equal: Report, stem: str) -> dict[str, Any]:
    work = arguments.work
    dense = work / f"{stem}-dense.onnx"
    if not dense.exists():
        module = load_model(arguments.dense, arch=arguments.arch, classes=10, shape=SHAPE).module.eval()
        export_model(module, torch.randn(1, *SHAPE), format="onnx", path=dense, metadata={})
    files = [dense, work / f"{stem}-latency-{seed}" / "model.onnx", work / f"{stem}-macs-{seed}" / "model.onnx"]
    _, first, second = dpm_cli.benchmark(files, threads=[1], seconds=arguments.seconds, turns=20, trust=True)
    return {
        "model": arguments.arch,
        "seed": seed,
        "latency target %": latency.slim.accuracy,
        "MAC target %": equal.slim.accuracy,
        "latency target taken": 1 / first.faster,
        "MAC target taken": 1 / second.faster,
        "latency target MACs": latency.slim.macs / latency.dense.macs,
        "MAC target MACs": equal.slim.macs / equal.dense.macs,
    }


if __name__ == "__main__":
    main()

"""Pruned to half of the MACs and quantized: how much faster and smaller than the dense file, and what does int8 cost?

    python benchmarks/int8.py speed --work runs                      ResNet-50, random weights: time and bytes
    python benchmarks/int8.py digits --work runs                     the shipped recipe, from training on
    python benchmarks/int8.py resnet56 --work runs --data FOLDER --dense resnet56.pt     test accuracy

Every file is one that `dpm prune` delivers, with its defaults. Times are those of `dpm benchmark`: dense fp32, slim
fp32 and slim int8 in ONNX Runtime, in turns, one thread, one picture, compared by processor time. "int8 costs" is test
accuracy of the slim model less that of its int8 file. Finished runs are kept in the folder and not repeated.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import print_table, read_rows, save
from latency_targets import CLASSES, draw_pictures
from zoo_child import make_lively_

import dpm_cli
from dpm_cli.export import export_model
from dpm_cli.models import build
from dpm_cli.report import Report

NAME = "int8"
FILES = ["onnx", "onnx-int8"]
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]  # of CIFAR-10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["speed", "digits", "resnet56"])
    parser.add_argument("--work", type=Path, required=True, help="where models and runs are kept")
    parser.add_argument("--data", type=Path, help="folder with train/ and test/")
    parser.add_argument("--dense", type=Path, help="weights of ResNet-56")
    parser.add_argument("--epochs", type=int, default=2, help="of ResNet-56")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each file in all turns")
    parser.add_argument("--turns", type=int, default=50)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    match arguments.case:
        case "speed":
            row = measure_speed(arguments)
        case "digits":
            row = measure_digits(arguments.work)
        case _:
            row = measure_resnet56(arguments)
    rows = {each["case"]: each for each in read_rows(NAME)} | {arguments.case: {"case": arguments.case, **row}}
    print(f"written to {save(NAME, list(rows.values()))}")
    print_table([rows[arguments.case]])


def measure_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    work, shape, arch = arguments.work, (3, 224, 224), "torchvision:resnet50"
    draw_pictures(work / "pictures")
    dense, weights, output = work / "resnet50.onnx", work / "resnet50.pt", work / "resnet50-int8"
    if not weights.exists():
        torch.manual_seed(0)
        net = build(arch, classes=CLASSES, shape=shape)
        make_lively_(net, torch.randn(8, *shape))
        export_model(net, torch.randn(1, *shape), format="onnx", path=dense, metadata={})
        torch.save(net.state_dict(), weights)
    recipe = {
        "model": {"arch": arch, "classes": CLASSES, "input": list(shape)},
        "data": {"name": "folder", "root": str(work / "pictures"), "batch": 16, "validation": 0.1},
        "prune": {"target": {"macs": 0.5}},
        "train": {"epochs": 0},
        "finetune": {"epochs": 0},
        "quantize": {"images": 16, "max_drop": None},  # noise is no picture: only time and size count here
        "export": FILES,
    }
    report = dpm_cli.prune(str(weights), recipe, output=output, device="cpu", resume=True)
    files = [dense, output / "model.onnx", output / "model.int8.onnx"]
    first, slim, int8 = dpm_cli.benchmark(
        files, threads=[1], seconds=arguments.seconds, turns=arguments.turns, trust=True
    )
    return {
        "MACs": report.slim.macs / report.dense.macs,
        "dense ms": first.processor,
        "slim ms": slim.processor,
        "int8 ms": int8.processor,
        "slim faster": slim.faster,
        "int8 faster": int8.faster,
        "slim smaller": first.bytes / slim.bytes,
        "int8 smaller": first.bytes / int8.bytes,
        "doubt": int8.doubt or first.doubt,
    }


def measure_digits(work: Path) -> dict[str, Any]:
    recipe = dpm_cli.load_recipe("digits", ["prune.target.macs=0.5", "export=[onnx, onnx-int8]"])
    dense = work / "digits.pt"
    if not dense.exists():
        dpm_cli.train(recipe, output=dense)
    return compare(dpm_cli.prune(dense, recipe, output=work / "digits-int8", device="cpu", resume=True))


def measure_resnet56(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = {
        "model": {"arch": "resnet56", "classes": 10, "input": [3, 32, 32]},
        "data": {
            "name": "folder", "root": str(arguments.data), "batch": 64, "validation": 0.1, "mean": MEAN, "std": STD
        },
        "prune": {"target": {"macs": 0.5}, "rounds": 1},
        "train": {"epochs": arguments.epochs, "lr": 0.02},
        "finetune": {"epochs": 0},
        "export": FILES,
    }  # fmt: skip
    output = arguments.work / "resnet56-int8"
    return compare(dpm_cli.prune(arguments.dense, recipe, output=output, device="cpu", resume=True))


def compare(report: Report) -> dict[str, Any]:
    (int8,) = (made for made in report.exports if made.format == "onnx-int8")
    assert report.slim.accuracy is not None
    assert int8.accuracy is not None
    return {
        "MACs": report.slim.macs / report.dense.macs,
        "dense %": report.dense.accuracy,
        "slim %": report.slim.accuracy,
        "int8 %": int8.accuracy,
        "int8 costs": report.slim.accuracy - int8.accuracy,
        "same answers %": int8.agreement,
        "in fp32": len(int8.kept),
    }


if __name__ == "__main__":
    main()

"""How much faster is a slim model? Dense and slim by turns, in torch and in ONNX Runtime on the CPU.

    python benchmarks/latency.py                                  ResNet-50 to half of its MACs, batch 1
    python benchmarks/latency.py timm:deit_tiny_patch16_224 --target 0.4 --batch 8
    python benchmarks/latency.py timm:deit_tiny_patch16_224 --set prune.embedding=prune

Random weights, calibrated BatchNorm; units are chosen at once by a recipe's defaults, which `--set` changes, and
removed. Every turn times one call of each; "faster" is the median over the turns of dense by slim, with quartiles.
Files are those that `dpm export` writes, opened as `dpm evaluate` opens them.
"""

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import paired_ratio, print_table, save, time_in_turns
from zoo_child import make_lively_

from dpm_cli import load_recipe
from dpm_cli.export import export_model, open_exported
from dpm_cli.graph import compact_
from dpm_cli.jobs.plan import Plan
from dpm_cli.measure import Run, flushing_denormals
from dpm_cli.models import build

SHAPE = (3, 224, 224)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="torchvision:resnet50")
    parser.add_argument("--target", type=float, default=0.5, help="fraction of the MACs to keep")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, widths = measure(
        arguments.model, arguments.target, batch=arguments.batch, turns=arguments.turns, overrides=arguments.overrides
    )
    print_table(rows)
    changes = [override.rpartition("=")[2] for override in arguments.overrides]
    name = "-".join(["latency", arguments.model.partition(":")[2], *changes])
    print(f"written to {save(name, rows, widths=widths, **vars(arguments))}")


def measure(
    name: str, target: float, *, batch: int, turns: int, overrides: list[str]
) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    torch.manual_seed(0)
    shape = SHAPE
    dense = build(name, classes=1000, shape=shape)
    make_lively_(dense, torch.randn(8, *shape))
    slim = build(name, classes=1000, shape=shape).eval()
    slim.load_state_dict(dense.state_dict())
    settings = [f"model.arch={name}", "model.classes=1000", f"model.input={list(shape)}", f"prune.target.macs={target}"]
    plan = Plan(slim, load_recipe("folder", settings + overrides))
    alive = plan.survivors()
    widths = [list(width) for width in plan.groups.widths(alive)]
    compact_(slim, plan.groups, alive)
    macs = [plan.groups.cost.macs(mask) for mask in (np.ones_like(alive), alive)]
    images = torch.randn(batch, *shape)
    rows = []
    with TemporaryDirectory() as folder, torch.no_grad(), flushing_denormals():
        files = {}
        for kind, module in (("dense", dense), ("slim", slim)):
            files[kind] = Path(folder) / f"{kind}.onnx"
            export_model(module, images[:1], format="onnx", path=files[kind], metadata={})
        runtimes: dict[str, dict[str, Run]] = {
            "torch": {"dense": dense, "slim": slim},
            "onnxruntime": {kind: open_exported(path).outputs for kind, path in files.items()},
        }
        for runtime, runs in runtimes.items():
            calls = {kind: lambda run=run: run(images) for kind, run in runs.items()}
            times = time_in_turns(calls, turns=turns, warm_up=5)
            ratios = [a / b for a, b in zip(times["dense"], times["slim"], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            rows.append(
                {
                    "model": name,
                    "runtime": runtime,
                    "batch": batch,
                    "threads": torch.get_num_threads(),
                    "dense MACs": macs[0],
                    "slim MACs": macs[1],
                    "MACs ratio": macs[0] / macs[1],
                    "dense ms": statistics.median(times["dense"]) * 1e3,
                    "slim ms": statistics.median(times["slim"]) * 1e3,
                    "faster": paired_ratio(times, "dense", "slim"),
                    "low": low,
                    "high": high,
                    "file ratio": files["dense"].stat().st_size / files["slim"].stat().st_size,
                }
            )
    return rows, widths


if __name__ == "__main__":
    main()

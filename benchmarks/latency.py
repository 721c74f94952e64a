"""How much faster is a slim model? Dense and slim by turns, in torch and ONNX Runtime on the CPU, or on CUDA.

    python benchmarks/latency.py                                  ResNet-50 to half of its MACs, batch 1
    python benchmarks/latency.py timm:deit_tiny_patch16_224 --target 0.4 --batch 8
    python benchmarks/latency.py timm:deit_tiny_patch16_224 --set prune.embedding=prune

Random weights, calibrated BatchNorm; units are chosen at once by a recipe's defaults, which `--set` changes, and
removed. Every turn times one call of each; "faster" is the median over the turns of dense by slim, with quartiles.
Files are those that `dpm export` writes, opened as `dpm evaluate` opens them. On CUDA torch runs kernel by kernel,
and as a CUDA graph, which leaves out the time to launch them.
"""

import argparse
import statistics
from functools import partial
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["torchvision:resnet50"])
    parser.add_argument("--target", type=float, default=0.5, help="fraction of the MACs to keep")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--side", type=int, default=224, help="pixels")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for model in given.models:
        rows, widths = measure(model, given)
        print_table(rows)
        changes = [override.rpartition("=")[2] for override in given.overrides]
        name = "-".join(
            ["latency", model.partition(":")[2], *changes, *([] if given.device.type == "cpu" else ["cuda"])]
        )
        settings = vars(given) | {"device": str(given.device)}
        print(f"written to {save(name, rows, widths=widths, **settings)}")


def measure(name: str, given: argparse.Namespace) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Return a row per batch size and runtime, and the widths that are left."""
    torch.manual_seed(0)
    shape, device = (3, given.side, given.side), given.device
    dense = build(name, classes=1000, shape=shape)
    make_lively_(dense, torch.randn(8, *shape))
    slim = build(name, classes=1000, shape=shape).eval()
    slim.load_state_dict(dense.state_dict())
    settings = [
        f"model.arch={name}",
        "model.classes=1000",
        f"model.input={list(shape)}",
        f"prune.target.macs={given.target}",
    ]
    plan = Plan(slim, load_recipe("folder", settings + given.overrides), torch.device("cpu"))
    alive = plan.survivors()
    widths = [list(width) for width in plan.groups.widths(alive)]
    compact_(slim, plan.groups, alive)
    macs = [plan.groups.cost.macs(mask) for mask in (np.ones_like(alive), alive)]
    rows = []
    with TemporaryDirectory() as folder, torch.no_grad(), flushing_denormals():
        files = {kind: Path(folder) / f"{kind}.onnx" for kind in ("dense", "slim")}
        modules: dict[str, Run] = {"dense": dense, "slim": slim}
        for kind, module in (("dense", dense), ("slim", slim)):
            export_model(module, torch.zeros(1, *shape), format="onnx", path=files[kind], metadata={})
            module.to(device)
        for batch in given.batch:
            images = torch.randn(batch, *shape, device=device)
            runtimes = {"torch": modules}
            if device.type == "cpu":
                runtimes["onnxruntime"] = {kind: open_exported(path).outputs for kind, path in files.items()}
            else:
                runtimes["torch, CUDA graph"] = {kind: capture(run, images) for kind, run in modules.items()}
            for runtime, runs in runtimes.items():
                calls = {kind: partial(run, images) for kind, run in runs.items()}
                times = time_in_turns(calls, turns=given.turns, warm_up=5)
                about = {"model": name, "device": device.type, "runtime": runtime, "batch": batch}
                rows.append(about | {"dense MACs": macs[0], "slim MACs": macs[1], "MACs ratio": macs[0] / macs[1]})
                rows[-1] |= compare(times)
                rows[-1]["file ratio"] = files["dense"].stat().st_size / files["slim"].stat().st_size
    return rows, widths


def compare(times: dict[str, list[float]]) -> dict[str, float]:
    """Return how many times faster slim is in the same turn: median and quartiles."""
    ratios = [a / b for a, b in zip(times["dense"], times["slim"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "threads": torch.get_num_threads(),
        "dense ms": statistics.median(times["dense"]) * 1e3,
        "slim ms": statistics.median(times["slim"]) * 1e3,
        "faster": paired_ratio(times, "dense", "slim"),
        "low": low,
        "high": high,
    }


def capture(run: Run, images: torch.Tensor) -> Run:
    """Record the kernels of a forward pass over these images, and return what plays them again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(images)

    def play(_: torch.Tensor) -> object:
        graph.replay()
        return outputs

    return play


if __name__ == "__main__":
    main()

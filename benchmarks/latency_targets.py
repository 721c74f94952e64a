"""Does the delivered file take the share of the dense latency that was asked for? Dense and slim files in turns.

    python benchmarks/latency_targets.py --work runs                  three models, to 0.6 and 0.4
    python benchmarks/latency_targets.py --work runs --models resnet56 --shares 0.5 --again

Random weights with calibrated BatchNorm, cut at once without training: latency does not depend on what the weights are.
Everything else is `dpm prune` as users run it, with its export. Both files are then opened anew by `dpm benchmark` and
called in turns; "taken" is slim by dense in processor time, which other programs do not slow down. Work is kept: what
was pruned is not pruned again, rows are measured again with --again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_table, read_rows, save
from PIL import Image
from zoo_child import make_lively_

import dpm_cli
from dpm_cli.export import export_model
from dpm_cli.models import build

MODELS: dict[str, tuple[int, ...]] = {
    "resnet56": (3, 32, 32),
    "torchvision:mobilenet_v2": (3, 224, 224),
    "torchvision:resnet50": (3, 224, 224),
}
CLASSES = 10
ALLOWED = 1.03  # of what was asked
NAME = "latency-targets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where models, pictures and runs are kept")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.6, 0.4])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each file in all turns")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--again", action="store_true", help="measure rows again that are there")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    draw_pictures(arguments.work / "pictures")
    rows = {(row["model"], row["asked"]): row for row in read_rows(NAME)}
    for model in arguments.models:
        for share in arguments.shares:
            if (model, share) not in rows or arguments.again:
                rows[model, share] = measure(model, share, arguments)
                print(json.dumps(rows[model, share]), flush=True)
                ordered = [rows[key] for key in sorted(rows, key=lambda key: (list(MODELS).index(key[0]), -key[1]))]
                save(NAME, ordered, seconds=arguments.seconds, turns=arguments.turns)
    print_table(
        [row for (model, share), row in rows.items() if model in arguments.models and share in arguments.shares]
    )


def draw_pictures(folder: Path) -> None:
    """Noise to look at: a run wants images, also one that does not train."""
    for split in ("train", "test"):
        for label in range(CLASSES):
            for number in range(10):
                path = folder / split / f"{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    noise = np.random.default_rng([label, number, split == "test"]).integers(0, 256, (32, 32, 3))
                    Image.fromarray(noise.astype(np.uint8)).save(path)


def measure(model: str, share: float, arguments: argparse.Namespace) -> dict[str, Any]:
    shape, work = MODELS[model], arguments.work
    stem = model.rpartition(":")[2]
    dense, weights, output = work / f"{stem}.onnx", work / f"{stem}.pt", work / f"{stem}-{share:g}"
    torch.manual_seed(0)
    net = build(model, classes=CLASSES, shape=shape)
    make_lively_(net, torch.randn(8, *shape))
    if not dense.exists():
        export_model(net, torch.randn(1, *shape), format="onnx", path=dense, metadata={})
        torch.save(net.state_dict(), weights)
    recipe = {
        "model": {"arch": model, "classes": CLASSES, "input": list(shape)},
        "data": {"name": "folder", "root": str(work / "pictures"), "batch": 16, "validation": 0.1},
        "prune": {"target": {"latency": share}},
        "train": {"epochs": 0},
        "finetune": {"epochs": 0},
        "export": ["onnx"],
    }
    started = time.process_time()
    report = dpm_cli.prune(str(weights), recipe, output=output, device="cpu", resume=True)
    seconds = time.process_time() - started
    first, slim = dpm_cli.benchmark(
        [dense, output / "model.onnx"], threads=[1], seconds=arguments.seconds, turns=arguments.turns, trust=True
    )
    return {
        "model": model,
        "asked": share,
        "dense ms": first.processor,
        "slim ms": slim.processor,
        "taken": 1 / slim.faster,
        "within 3 %": 1 / slim.faster <= share * ALLOWED,
        "MACs": report.slim.macs / report.dense.macs,
        "params": report.slim.params / report.dense.params,
        "CPU seconds": round(seconds, 1),
        "notes": [note for note in report.notes if "latency" in note],
        "doubt": slim.doubt or first.doubt,
    }


if __name__ == "__main__":
    main()

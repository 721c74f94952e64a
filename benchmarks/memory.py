"""Peak memory of a pruning run against plain training, each in a fresh process.

    python benchmarks/memory.py --root FOLDER    ResNet-56 at batch 128; FOLDER holds train/<class>/… of 32×32 images

Both take the same number of steps on the same images. The peak is that of the resident set (VmHWM), so the interpreter,
torch and the images are in it; on CUDA also that of the device's memory.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import print_table, save

KINDS = ("plain", "prune")


def recipe(root: Path, arch: str, images: int, batch: int) -> dict[str, Any]:
    return {
        "model": {"arch": arch},
        "data": {"name": "folder", "root": str(root), "limit": images, "batch": batch},
        "prune": {"target": {"macs": 0.5}, "rounds": 2, "end": 0.6},
        "decay": {"steps": 2},
        "train": {"epochs": 3},
        "finetune": {"epochs": 0},
        "export": [],
    }


def run(kind: str, root: Path, arch: str, *sizes: int) -> dict[str, Any]:
    """In this process."""
    import torch

    import dpm_cli
    from dpm_cli.models import build

    with TemporaryDirectory() as folder:
        if kind == "plain":
            dpm_cli.train(recipe(root, arch, *sizes), output=Path(folder) / "model.pt")
        else:
            torch.manual_seed(0)
            dpm_cli.prune(build(arch, classes=10, shape=(3, 32, 32)), recipe(root, arch, *sizes), output=folder)
    peak = {"MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available():
        peak["device MB"] = torch.cuda.max_memory_allocated() / 2**20
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--arch", default="resnet56")
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.one, arguments.root, arguments.arch, arguments.images, arguments.batch)))
        return
    peaks = {}
    for kind in KINDS:
        done = subprocess.run([sys.executable, *sys.argv, "--one", kind], stdout=subprocess.PIPE, text=True, check=True)
        peaks[kind] = json.loads(done.stdout.splitlines()[-1])
    rows = [
        {"model": arguments.arch, "peak": key}
        | {kind: peaks[kind][key] for kind in KINDS}
        | {"ratio": peaks["prune"][key] / peaks["plain"][key]}
        for key in peaks["plain"]
    ]
    print_table(rows)
    save(f"memory-{'cuda' if len(rows) > 1 else 'cpu'}", rows)


if __name__ == "__main__":
    main()

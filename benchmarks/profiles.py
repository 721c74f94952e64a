"""Where a training step spends its time, and where it waits for the device.

    python benchmarks/profiles.py --root FOLDER --device cuda      FOLDER holds train/<class>/… of 32×32 images

Profiles steps of plain training, and the same while every unit decays, by torch.profiler: the operators that take most,
on the device and on the CPU, the number of kernels launched, and a trace for chrome://tracing. Then, on CUDA, every
wait for the device in a short pruning run, by the line of our code that caused it (torch.cuda.set_sync_debug_mode).
"""

import argparse
import collections
import gzip
import shutil
import tempfile
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import FOLDER, print_table, save
from step import Contender
from torch.profiler import ProfilerActivity

import dpm_cli
from dpm_cli.engine.backends import tuned_backends
from dpm_cli.graph import find_groups
from dpm_cli.models import build
from dpm_cli.recipe.sections import Engine

SHAPE = (3, 32, 32)
PACKAGE = Path(dpm_cli.__file__).parent
MOST = 12  # rows of a table


def profile_steps(given: argparse.Namespace, device: torch.device, *, plain: bool) -> list[dict[str, Any]]:
    """Return the operators that take most of some steps, with the number of launches of all."""
    model = build(given.arch, classes=10, shape=SHAPE)
    contender = Contender(model, find_groups(model, torch.zeros(2, *SHAPE)), device)
    images, labels = (
        torch.randn(given.batch, *SHAPE, device=device),
        torch.randint(0, 10, (given.batch,), device=device),
    )
    step = partial(contender.step, images.contiguous(memory_format=torch.channels_last), labels, plain=plain)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with tuned_backends(device, Engine()):
        for _ in range(given.steps):
            step()
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(given.steps):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
    name = "plain" if plain else "decaying"
    keep_trace(profile, f"trace-{name}-{device.type}")
    found = profile.key_averages()
    of_device = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.table(sort_by=of_device, row_limit=25))
    launches = sum(
        event.count for event in found if event.key in ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC")
    )
    total = sum(event.self_cpu_time_total for event in found), sum(event.self_device_time_total for event in found)
    heaviest = sorted(found, key=lambda event: -getattr(event, of_device))[:MOST]
    every = {"steps": name, "operator": "all", "calls": launches / given.steps}
    rows = [every | {"CPU ms": total[0] / 1e3 / given.steps, "device ms": total[1] / 1e3 / given.steps}]
    return rows + [
        {
            "steps": name,
            "operator": event.key[:60],
            "calls": event.count / given.steps,
            "CPU ms": event.self_cpu_time_total / 1e3 / given.steps,
            "device ms": event.self_device_time_total / 1e3 / given.steps,
        }
        for event in heaviest
    ]


def keep_trace(profile: torch.profiler.profile, name: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        with path.open("rb") as plain, gzip.open(FOLDER / f"{name}.json.gz", "wb", compresslevel=6) as packed:
            shutil.copyfileobj(plain, packed)


def count_waits(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Prune for a few epochs and return, for every line of ours, how often it made the CPU wait for the device."""
    places: collections.Counter[str] = collections.Counter()

    def note(*_: Any, **__: Any) -> None:
        ours = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        if ours:
            places[f"{Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno} {ours[-1].line}"[:110]] += 1

    recipe = {
        "model": {"arch": given.arch},
        "data": {"name": "folder", "root": str(given.root), "limit": given.batch * 20, "batch": given.batch},
        "prune": {"target": {"macs": 0.5}, "rounds": 1},
        "decay": {"steps": 20},
        "train": {"epochs": 3},
        "finetune": {"epochs": 1},
        "export": [],
    }
    shown = warnings.showwarning
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("always")
        warnings.showwarning = note
        try:
            dpm_cli.prune(build(given.arch, classes=10, shape=SHAPE), recipe, output=folder, device="cuda")
        finally:
            warnings.showwarning = shown
            torch.cuda.set_sync_debug_mode("default")
    return [{"waits": count, "in 80 steps, by": place} for place, count in places.most_common(25)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arch", default="resnet56")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    device = torch.device(given.device)
    rows = [row for plain in (True, False) for row in profile_steps(given, device, plain=plain)]
    print_table(rows)
    save(f"profile-{device.type}", rows, arch=given.arch, batch=given.batch)
    if device.type == "cuda":
        waits = count_waits(given)
        if waits:
            print_table(waits)
        save("waits-cuda", waits, arch=given.arch, batch=given.batch)


if __name__ == "__main__":
    main()

"""Training throughput of the defaults against the plain loop that users write, over the same image folder.

    python benchmarks/throughput.py --root FOLDER              FOLDER holds train/<class>/… of 32×32 images
    python benchmarks/throughput.py --root FOLDER --compiled   with torch.compile, which takes its time
    python benchmarks/throughput.py --root FOLDER --accuracy   bf16 against fp32, 3 seeds; goes on where it was stopped

The plain loop: fp32, contiguous, a DataLoader with two workers and torchvision's transforms. Ours: that of `dpm train`.
In turns of some steps in one process; the loader's workers rest during our turns. On a CPU ResNet-20, on CUDA
ResNet-56, there also without the CUDA graphs that ours uses if they are faster.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from common import FOLDER, paired_ratio, print_table, save, time_in_turns
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import dpm_cli
from dpm_cli.engine.allocator import keeping_freed_memory
from dpm_cli.engine.learner import Learner
from dpm_cli.engine.precision import choose_precision
from dpm_cli.jobs.loading import load_splits
from dpm_cli.models import build
from dpm_cli.recipe import Recipe, parse_recipe

BATCH = 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
Batches = Iterator[tuple[Tensor, Tensor]]


def recipe(root: Path, arch: str, *, batch: int = BATCH, limit: int | None = None, **changes: Any) -> Recipe:
    data = {"name": "folder", "root": str(root), "batch": batch, "mean": MEAN, "std": STD, "limit": limit}
    return parse_recipe({"model": {"arch": arch}, "data": data, "prune": {"target": {"macs": 0.5}}} | changes)


def endless(epochs: Callable[[int], Batches]) -> Batches:
    epoch = 0
    while True:
        yield from epochs(epoch)
        epoch += 1


def plain_batches(root: Path, device: torch.device, batch: int) -> Batches:
    change = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = ImageFolder(str(root / "train"), transforms.Compose([*change, transforms.Normalize(MEAN, STD)]))
    on_cuda = device.type == "cuda"
    loader = DataLoader(
        images, batch, shuffle=True, num_workers=2, drop_last=True, pin_memory=on_cuda, persistent_workers=True
    )
    for images, labels in endless(lambda _: iter(loader)):
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def plain_step(model: nn.Module) -> Callable[[Tensor, Tensor], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def our_batches(settings: Recipe, device: torch.device) -> Batches:
    train = load_splits(settings, device).train
    augment, batch = settings.data.augment, settings.data.batch
    return endless(lambda epoch: train.batches(batch, seed=0, epoch=epoch, augment=augment, drop_last=True))


def our_step(settings: Recipe, model: nn.Module, device: torch.device) -> Callable[[Tensor, Tensor], object]:
    learner = Learner(
        model,
        settings.train.model_copy(update={"epochs": 1000}),
        precision=choose_precision("auto", device),
        steps_per_epoch=1000,
        seed=0,
        engine=settings.engine,
    )
    return lambda images, labels: learner.step_(images, labels, step=1)


def our_loops(arch: str, settings: Recipe, device: torch.device, backend: str | None) -> dict[str, Any]:
    """Return the steps to compare, by name. backend: of torch.compile, which is compared only if it is given."""

    def make() -> nn.Module:
        network = build(arch, classes=10, shape=(3, 32, 32)).to(device).train()
        network.to(memory_format=torch.channels_last)
        return network

    plainly = settings.model_copy(update={"engine": settings.engine.model_copy(update={"compile": "off"})})
    loops = {"dpm": our_step(settings, make(), device)}
    if device.type == "cuda":
        loops["dpm, without CUDA graphs"] = our_step(plainly, make(), device)
    if backend:
        loops["dpm, compiled"] = our_step(plainly, torch.compile(make(), backend=backend), device)  # type: ignore[arg-type]
    if backend and device.type == "cuda":
        graphed = torch.compile(make(), mode="reduce-overhead")
        loops["dpm, compiled with CUDA graphs"] = our_step(plainly, graphed, device)  # type: ignore[arg-type]
    return loops


def measure(root: Path, device: torch.device, given: argparse.Namespace) -> list[dict[str, Any]]:
    arch = given.arch or ("resnet56" if device.type == "cuda" else "resnet20")
    settings, steps, batch = recipe(root, arch, batch=given.batch), given.steps, given.batch
    plain = plain_step(build(arch, classes=10, shape=(3, 32, 32)).to(device).train())
    taken = {"plain": plain} | our_loops(arch, settings, device, given.backend if given.compiled else None)
    data = {"plain": plain_batches(root, device, batch)} | {
        name: our_batches(settings, device) for name in taken if name != "plain"
    }

    def several(step: Callable[[Tensor, Tensor], object], batches: Batches) -> Callable[[], None]:
        def take() -> None:
            for _ in range(steps):
                step(*next(batches))

        return take

    allocator = ExitStack()

    def settle() -> None:
        """The workers fill their queues; then memory is handled as in a run of ours, whose first step fetches it."""
        time.sleep(given.settle)
        allocator.enter_context(keeping_freed_memory())
        taken["dpm"](*next(data["dpm"]))

    calls = {name: several(step, data[name]) for name, step in taken.items()}
    calls = {"plain": calls.pop("plain"), "settle": settle} | calls
    calls["data alone"] = several(lambda images, labels: None, data["dpm"])
    calls["release"] = allocator.close
    times = time_in_turns(calls, turns=given.turns)
    return [
        {
            "model": arch,
            "device": device.type,
            "loop": name,
            "images / s": batch * steps / statistics.median(times[name]),
            "times plain": paired_ratio(times, "plain", name),
            "times dpm": paired_ratio(times, "dpm", name),
        }
        for name in calls
        if name not in ("settle", "release")
    ]


def measure_accuracy(root: Path, seeds: int, epochs: int, limit: int) -> list[dict[str, Any]]:
    """Test accuracy of a ResNet-20 trained from scratch in each precision; every finished run is kept in the file."""
    path = FOLDER / "throughput-accuracy.json"
    settings = {"epochs": epochs, "limit": limit}
    done = json.loads(path.read_text()) if path.exists() else {}
    rows = done.get("rows", []) if done.get("settings") == settings else []
    for seed in range(seeds):
        for precision in ("fp32", "bf16"):
            if any((row["seed"], row["precision"]) == (seed, precision) for row in rows):
                continue
            training = {"epochs": epochs, "lr": 0.1}
            chosen = recipe(root, "resnet20", limit=limit, train=training, precision=precision, seed=seed)
            with TemporaryDirectory() as folder:
                result = dpm_cli.train(chosen, output=Path(folder) / "model.pt")
            rows.append({"seed": seed, "precision": precision, "test accuracy": result.accuracy})
            save("throughput-accuracy", rows, **settings)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--arch")
    parser.add_argument("--settle", type=float, default=2.0, help="seconds in which the loader's workers come to rest")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--limit", type=int, default=20_000)
    arguments = parser.parse_args()
    if arguments.accuracy:
        print_table(measure_accuracy(arguments.root, arguments.seeds, arguments.epochs, arguments.limit))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(arguments.root, device, arguments)
    print_table(rows)
    name = f"throughput-{device.type}{'-compiled' if arguments.compiled else ''}"
    save(name, rows, turns=arguments.turns, steps=arguments.steps)


if __name__ == "__main__":
    main()

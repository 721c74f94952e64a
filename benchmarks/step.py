"""What DPM adds to a training step: plain against every unit decaying with rectifying on, in turns on the same model.

python benchmarks/step.py                   all of these:
python benchmarks/step.py --only step       ResNet-56 at batch 128 and ResNet-50 at 224, batch 16
python benchmarks/step.py --only penalty    DepGraph's penalty against Torch-Pruning's GroupNormPruner.regularize
python benchmarks/step.py --only precision  a plain step in bf16 against one in fp32, for nets of different kinds
python benchmarks/step.py --only allocator  a plain step in a process that keeps freed memory, and in one that does not
python benchmarks/step.py --only width      a plain step of a net at half its widths against one at all of them
"""

import argparse
import copy
import itertools
import statistics
import time
from contextlib import ExitStack
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from common import paired_ratio, print_table, save, time_in_turns
from torch import Tensor, nn

from dpm_cli.engine.allocator import keeping_freed_memory
from dpm_cli.engine.optimizer import make_optimizer
from dpm_cli.engine.precision import Precision, choose_precision
from dpm_cli.engine.step import train_step
from dpm_cli.graph import Groups, Units, compact_, find_groups
from dpm_cli.method.decay import Decay
from dpm_cli.method.pruners.depgraph import GroupImportance
from dpm_cli.method.rectify import Rectifier
from dpm_cli.models import build
from dpm_cli.recipe import Training
from dpm_cli.recipe.sections import Rectify

PRECISIONS = (
    ("resnet20", 32, 64),
    ("torchvision:mobilenet_v2", 32, 64),
    ("torchvision:mobilenet_v2", 224, 8),
    ("torchvision:efficientnet_b0", 224, 4),
    ("torchvision:mobilenet_v3_small", 224, 8),
    ("torchvision:shufflenet_v2_x1_0", 224, 8),
    ("torchvision:convnext_tiny", 224, 2),
    ("torchvision:vit_b_16", 224, 1),
    ("torchvision:resnext50_32x4d", 224, 2),
)
ALLOCATIONS = (("resnet20", 32, 128), ("resnet56", 32, 128), ("torchvision:resnet50", 224, 16))
CASES = {
    "resnet56": ("resnet56", (3, 32, 32), 128),
    "resnet50": ("torchvision:resnet50", (3, 224, 224), 16),
    "resnet50-128": ("torchvision:resnet50", (3, 224, 224), 128),  # for a GPU
    "digits": ("digits", (1, 8, 8), 8),  # only to see that it runs
}


def cross_entropy(outputs: object, labels: Tensor) -> Tensor:
    assert isinstance(outputs, Tensor)
    return F.cross_entropy(outputs.float(), labels)


class Contender:
    """A model with its optimizer, and the hooks of a training step."""

    def __init__(self, model: nn.Module, groups: Groups | None, device: torch.device) -> None:
        self.model = copy.deepcopy(model).to(device).train()
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, Training(lr=1e-3, weight_decay=5e-4))
        self.precision = choose_precision("auto", device)
        self.decay = None
        if groups is not None:
            units = Units(groups, self.model)
            group_of_unit = torch.from_numpy(groups.group_of_unit).to(device)
            # No release at this rate, so every unit goes on decaying and nothing is skipped.
            rectifier = Rectifier(group_of_unit, len(groups), Rectify(rate=1e30, length=1.0))
            self.decay = Decay(units, steps=1_000_000, rectifier=rectifier)
            self.decay.start(np.ones(groups.units, bool))

    def step(self, images: Tensor, labels: Tensor, *, plain: bool = False) -> None:
        decay = None if plain else self.decay
        train_step(
            self.model,
            self.optimizer,
            images,
            labels,
            objective=cross_entropy,
            precision=self.precision,
            before_step=[decay.observe] if decay else [],
            after_step=[decay.advance_] if decay else [],
        )

    def hooks_alone(self) -> None:
        assert self.decay
        self.decay.observe()
        self.decay.advance_()


def floor_seconds(units: Units) -> float:
    """The time of the bytes that must move: one read of weights and of gradients, one write of the decaying rows."""
    size = sum(parameter.numel() for parameter in units.parameters)
    source = torch.ones(3, size, device=units.device)
    target = torch.empty(size, device=units.device)
    times = time_in_turns({"move": lambda: torch.add(source[0], source[1], out=target)}, turns=20)
    return statistics.median(times["move"])


@keeping_freed_memory()
def measure(case: str, turns: int, device: torch.device) -> dict[str, object]:
    arch, shape, batch = CASES[case]
    model = build(arch, classes=10, shape=shape)
    groups = find_groups(model, torch.zeros(2, *shape))
    contender = Contender(model, groups, device)
    images, labels = torch.randn(batch, *shape, device=device), torch.randint(0, 10, (batch,), device=device)
    calls = {name: partial(contender.step, images, labels, plain=name == "plain") for name in ("plain", "dpm")}
    times = time_in_turns(calls, turns=turns)
    hooks = statistics.median(time_in_turns({"hooks": contender.hooks_alone}, turns=turns)["hooks"])
    assert contender.decay
    floor = floor_seconds(contender.decay.units)
    plain_seconds = statistics.median(times["plain"])
    return {
        "model": case,
        "device": device.type,
        "units": groups.units,
        "plain ms": 1e3 * plain_seconds,
        "with dpm ms": 1e3 * statistics.median(times["dpm"]),
        "ratio": paired_ratio(times, "dpm", "plain"),
        "hooks alone ms": 1e3 * hooks,
        "hooks / step": hooks / plain_seconds,
        "hooks / bytes floor": hooks / floor,
    }


def compare_penalties(turns: int, device: torch.device) -> dict[str, object]:
    """Time both on one thread's own clock on the CPU, on CUDA by the wall clock with a wait for the device."""
    import torch_pruning as tp  # type: ignore[import-untyped]

    model = build("resnet56", classes=10, shape=(3, 32, 32)).train()
    example = torch.zeros(2, 3, 32, 32)
    groups = find_groups(model, example)
    model, example = model.to(device), example.to(device)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    peer = tp.pruner.GroupNormPruner(
        model, example, importance=importance, reg=5e-4, ignored_layers=[model.linear], global_pruning=True
    )
    peer.update_regularizer()
    twin = copy.deepcopy(model)
    twin.to(memory_format=torch.channels_last)  # each as it runs in training
    ours = GroupImportance(groups, twin)
    for parameter in [*model.parameters(), *twin.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calls = {"peer": lambda: peer.regularize(model), "ours": lambda: ours.penalise_(5e-4)}
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    times = time_in_turns(calls, turns=turns, warm_up=min(turns, 10), clock=clock)
    torch.set_num_threads(threads)
    return {
        "penalty": f"group norm, resnet56, {'one thread, CPU time' if device.type == 'cpu' else device.type}",
        "torch-pruning ms": 1e3 * statistics.median(times["peer"]),
        "dpm ms": 1e3 * statistics.median(times["ours"]),
        "times faster": paired_ratio(times, "peer", "ours"),
    }


@keeping_freed_memory()
def compare_precisions(arch: str, side: int, batch: int, turns: int) -> dict[str, object]:
    """A plain training step in bf16 by that in fp32, one thread, CPU time."""
    shape, threads = (3, side, side), torch.get_num_threads()
    torch.set_num_threads(1)
    contender = Contender(build(arch, classes=10, shape=shape), None, torch.device("cpu"))
    images, labels = torch.randn(batch, *shape), torch.randint(0, 10, (batch,))

    def step(precision: Precision) -> None:
        contender.precision = precision
        contender.step(images, labels)

    calls = {name: partial(step, choose_precision(name, torch.device("cpu"))) for name in ("fp32", "bf16")}
    times = time_in_turns(calls, turns=turns, warm_up=1, clock=time.thread_time)
    torch.set_num_threads(threads)
    return {
        "model": arch,
        "images": f"{batch} of {side}×{side}",
        "fp32 ms": 1e3 * statistics.median(times["fp32"]),
        "bf16 ms": 1e3 * statistics.median(times["bf16"]),
        "of the time": paired_ratio(times, "bf16", "fp32"),
    }


def compare_allocators(arch: str, side: int, batch: int, turns: int) -> dict[str, object]:
    """Several plain steps, as glibc has it and with freed memory kept; that lasts for all steps of a run."""
    steps, allocator, device = 5, ExitStack(), torch.device("cpu")
    contender = Contender(build(arch, classes=10, shape=(3, side, side)), None, device)
    step = partial(contender.step, torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,)))

    def several() -> None:
        for _ in range(steps):
            step()

    def keep() -> None:
        allocator.enter_context(keeping_freed_memory())
        step()  # fetches the memory

    times = time_in_turns({"usual": several, "keep": keep, "kept": several, "release": allocator.close}, turns=turns)
    return {
        "model": arch,
        "images": f"{batch} of {side}×{side}",
        "as usual ms": 1e3 * statistics.median(times["usual"]) / steps,
        "kept ms": 1e3 * statistics.median(times["kept"]) / steps,
        "of the time": paired_ratio(times, "kept", "usual"),
    }


@keeping_freed_memory()
def compare_widths(arch: str, turns: int) -> list[dict[str, object]]:
    """A plain step at batch 128 of a net of which every group keeps half of its units, by that of the whole net."""
    dense, device, every = build(arch, classes=10, shape=(3, 32, 32)), torch.device("cpu"), torch.get_num_threads()
    groups, slim = find_groups(dense, torch.zeros(2, 3, 32, 32)), copy.deepcopy(dense)
    alive = np.zeros(groups.units, bool)
    for group in groups:
        alive[group.start : group.start + group.size // 2] = True
    compact_(slim, groups, alive)
    contenders = {"dense": Contender(dense, None, device), "slim": Contender(slim, None, device)}
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    rows: list[dict[str, object]] = []
    precisions: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    for precision, threads in itertools.product(precisions, sorted({1, every})):
        torch.set_num_threads(threads)
        for contender in contenders.values():
            contender.precision = choose_precision(precision, device)
        calls = {name: partial(contender.step, images, labels) for name, contender in contenders.items()}
        times = time_in_turns(calls, turns=turns)
        rows.append(
            {"model": arch, "precision": precision, "threads": threads}
            | {f"{name} ms": 1e3 * statistics.median(times[name]) for name in calls}
            | {"of the time": paired_ratio(times, "slim", "dense")}
        )
    torch.set_num_threads(every)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--only", choices=("step", "penalty", "precision", "allocator", "width"))
    parser.add_argument("--cases", nargs="+", default=["resnet56", "resnet50"], choices=CASES)
    arguments = parser.parse_args()
    device, turns = torch.device("cuda" if torch.cuda.is_available() else "cpu"), arguments.turns
    parts = {
        "step": lambda: [measure(case, turns, device) for case in arguments.cases],
        "penalty": lambda: [compare_penalties(turns, device)],
        "precision": lambda: [compare_precisions(*net, turns=min(turns, 5)) for net in PRECISIONS],
        "allocator": lambda: [compare_allocators(*net, turns=min(turns, 5)) for net in ALLOCATIONS],
        "width": lambda: compare_widths("resnet56", turns=min(turns, 10)),
    }
    for name in [arguments.only] if arguments.only else parts:
        rows = parts[name]()
        print_table(rows)
        save(f"{name}-{device.type}", rows, turns=turns)


if __name__ == "__main__":
    main()

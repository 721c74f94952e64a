"""Measure the latency of real exports, in turns with the dense one, and hold a run to its latency target.

Every convolution and matrix product is timed alone at a grid of its widths, once, see `dpm_cli.run.latency_table`. Two
real exports, the dense model and the smallest one that is allowed, fix both ends of the prediction; each further
measurement corrects it.
"""

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dpm_cli.engine.distributed import World
from dpm_cli.errors import TargetError
from dpm_cli.export import export_model, open_exported, require_runtime
from dpm_cli.export.probe import CPU, Operator, find_operators, time_operator, using_threads
from dpm_cli.files import write_text_atomic
from dpm_cli.graph import Cost, Groups, compact_
from dpm_cli.graph.labels import Flags, Ids
from dpm_cli.layers.images import Shape
from dpm_cli.measure import Run, hardware, measure_in_turns
from dpm_cli.method.budget import WidthLimits
from dpm_cli.recipe.deployment import Latency
from dpm_cli.run.latency_table import Grid, LatencyCost, Timed

SHARES = np.linspace(0, 1, 9)  # of the units that may leave each group, at which operators are timed
WIDE, FEW, BLOCK = 64, 5, 16  # wider layers are timed at fewer widths, multiples of what runtimes compute at once
ABOVE, BELOW = 0.01, 0.03  # of the target: a real export may take this much more or less than asked
ATTEMPTS, FIRST_ATTEMPTS = 5, 2  # to make prediction and measurement agree; before training, scores will still change
SECONDS, LEAST, TURNS = 1.0, 30, 20  # of each of two exports that are compared, its least calls, and their turns


class Compared(NamedTuple):
    """What a slim export takes, by the lower quartile of the calls; of one thread on a CPU, in processor time."""

    ratio: float  # to the dense one
    dense: float  # nanoseconds of the dense one
    doubt: str | None = None  # why the ratio may be wrong, in one clause


class Stopwatch:
    """Measures the exports of one model's structures, each in turns with the dense one."""

    def __init__(
        self, module: nn.Module, groups: Groups, settings: Latency, shape: Shape, device: torch.device = CPU
    ) -> None:
        """module: dense, in eval mode on the CPU. device: of the run; only the runtime torch runs there."""
        require_runtime(settings.runtime)
        self.module, self.groups, self.settings = module, groups, settings
        self.device = device if settings.runtime == "torch" else CPU
        self.images = torch.randn(settings.batch, *shape, generator=torch.Generator().manual_seed(0))
        self._known: dict[Operator | None, float] = {}  # nanoseconds; None for what every call takes
        self._dense: Run | None = None

    def with_groups(self, module: nn.Module, groups: Groups) -> "Stopwatch":
        """Return one for other groups of a module of the same structure, which measures nothing twice."""
        other = copy.copy(self)
        other.module, other.groups = module, groups
        return other

    def shrink(self, alive: Flags) -> nn.Module:
        """Return a copy with only these units. alive: (units,) of the dense model"""
        slim = copy.deepcopy(self.module)
        compact_(slim, self.groups, alive)
        return slim

    def compare(self, slim: nn.Module) -> Compared:
        """Measure the exports of a slim model and of the dense one in turns."""
        self._dense = self._dense or self._open(self.module)
        runs = {"dense": self._dense, "slim": self._open(slim)}
        with using_threads(self.settings.threads):
            measured = measure_in_turns(
                runs, self.images.to(self.device), seconds=SECONDS, least=LEAST, turns=TURNS
            ).values()
        alone = self.settings.threads == 1 and self.device == CPU
        dense, took = (latency.processor_ms if alone else latency.low_ms for latency in measured)
        doubt = next((latency.doubt for latency in measured if latency.doubt), None)
        return Compared(took / dense, dense * 1e6, doubt)

    def _open(self, module: nn.Module) -> Run:
        if self.settings.runtime == "torch":
            return copy.deepcopy(module).to(self.device).eval()
        with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
            path = Path(folder) / "model.onnx"
            export_model(module, self.images[:1], format="onnx", path=path, metadata={})
            return open_exported(path, runtime=self.settings.runtime, threads=self.settings.threads)

    def time_all(self, widths: WidthLimits) -> Timed:
        """Time the operators at a grid of their widths, and the dense and the smallest export."""
        cost = self.groups.cost
        sizes = np.stack([cost.sizes(_leave(self.groups, widths, share)) for share in SHARES])  # (shares, rows)
        found = find_operators(self.module, self.images)
        table = {}
        for name, axes, rows in zip(cost.parameter_names, cost.parameter_axes, cost.parameter_terms.factors):
            if operator := found.get(name):
                knots = [
                    _thin(sizes[:, rows[axes.index(axis)]]) if axis in axes else [operator.weight[axis]]
                    for axis in (0, 1)
                ]
                table[name] = Grid(
                    knots[0],
                    knots[1],
                    [[self._time(operator.resize(outputs, inputs)) for inputs in knots[1]] for outputs in knots[0]],
                )
        lowest = self.compare(self.shrink(widths.lowest(self.groups)))
        return Timed(table, lowest.dense, lowest.ratio * lowest.dense)

    def _time(self, operator: Operator | None) -> float:
        """Return nanoseconds of an operator beyond what every call takes; each kind is timed once."""
        if operator not in self._known:
            every = self._time(None) if operator else 0.0
            took = time_operator(
                operator, runtime=self.settings.runtime, threads=self.settings.threads, device=self.device
            )
            self._known[operator] = max(0.0, took - every)
        return self._known[operator]


def _thin(sizes: Ids) -> list[int]:
    """Choose the widths at which an axis is timed, of those that it can have."""
    found: list[int] = np.unique(sizes).tolist()
    if found[-1] <= WIDE:
        return found
    some = np.unique(np.linspace(0, len(found) - 1, FEW).round().astype(int)).tolist()
    return sorted({min(found[-1], -(-found[i] // BLOCK) * BLOCK) for i in some})


def _leave(groups: Groups, widths: WidthLimits, share: float) -> Flags:
    """Return (units,) survivors: in every group the fewest allowed, and this share of the others, in allowed widths."""
    alive = np.zeros(groups.units, bool)
    for group, least, step in zip(groups, widths.least.tolist(), widths.step.tolist()):
        kept = group.size if share == 1 else least + int((group.size - least) * share) // step * step
        alive[group.start : group.start + kept] = True
    return alive


def load_or_time(stopwatch: Stopwatch, widths: WidthLimits, *, cache: Path | None = None) -> Timed:
    """Return what an earlier run of this machine measured for this structure, or measure it now and remember it."""
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpm" / "latency"
    machine = {key: value for key, value in hardware().items() if key not in ("threads", "python", "dpm", "gpu")}
    structure = {
        "parameters": {name: list(tensor.shape) for name, tensor in stopwatch.module.named_parameters()},
        "images": list(stopwatch.images.shape),
        "settings": stopwatch.settings.model_dump(),
        "widths": [widths.least.tolist(), widths.step.tolist()],
        "device": "cpu" if stopwatch.device == CPU else torch.cuda.get_device_name(stopwatch.device),
        "table": 2,  # of what it holds
    }
    digest = hashlib.sha256(json.dumps(structure, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{digest}.json"
    if (timed := _read(path, machine)) is not None:
        return timed
    timed = stopwatch.time_all(widths)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps({"machine": machine, "timed": asdict(timed)}))
    except OSError:  # no home to write into: the next run measures again
        pass
    return timed


def _read(path: Path, machine: Mapping[str, Any]) -> Timed | None:
    """Read a remembered measurement; None if there is none, it is damaged, or another machine made it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["machine"] != machine:
            return None
        values = content["timed"]
        table = {str(name): Grid(**grid) for name, grid in values["table"].items()}
        return Timed(table, float(values["dense"]), float(values["lowest"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class Meter:
    """Predicts and checks the latency of one run's model. Only the main process measures; the others are told."""

    def __init__(self, settings: Latency, shape: Shape, world: World, device: torch.device) -> None:
        """device: of the run"""
        self.settings, self.shape, self.world, self.device = settings, shape, world, device
        self.checks = 0  # made after pruning
        self.note = ""  # what the last export took
        self._stopwatch: Stopwatch | None = None

    @property
    def stopwatch(self) -> Stopwatch:
        assert self._stopwatch  # `time_widths` was called
        return self._stopwatch

    def time_widths(self, module: nn.Module, groups: Groups, widths: WidthLimits) -> LatencyCost:
        """Fill the table, or read it. See `dpm_cli.method.survey`."""
        earlier = self._stopwatch
        self._stopwatch = stopwatch = (
            earlier.with_groups(module, groups)
            if earlier
            else Stopwatch(module, groups, self.settings, self.shape, self.device)
        )
        timed = self.world.share(load_or_time(stopwatch, widths) if self.world.is_main else None)
        assert timed is not None
        self.cost = LatencyCost(timed, groups.cost, widths.lowest(groups))
        return self.cost

    def settle(self, choose: Callable[[], Flags], limit: int, *, attempts: int = ATTEMPTS) -> None:
        """Export what would be chosen, measure it and correct the prediction, until both agree.

        choose: returns (units,) of the dense model that meet the target by the present prediction. limit: nanoseconds.
        """
        groups = self.stopwatch.groups
        for _ in range(attempts):
            alive = choose()
            took = self._measure(partial(self.stopwatch.shrink, alive))
            if limit * (1 - BELOW) <= took <= limit * (1 + ABOVE):
                break
            self.cost.correct_(took, groups.cost, alive)

    def check(self, model: nn.Module, cost: Cost, alive: Flags, limit: int) -> None:
        """Measure the pruned model. If it is too slow, correct the prediction, so that the target is missed again.

        Raises TargetError if that has not helped several times.
        """
        self.checks += 1
        took = self._measure(lambda: copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval())
        if took <= limit * (1 + ABOVE):
            return
        if self.checks > ATTEMPTS:
            raise TargetError(
                f"target latency of {limit / 1e6:.3g} ms was not met, however many units went: {self.note}; "
                "widths that are no multiple of 8 can be slow, so raise prune.round_to, or the target"
            )
        self.cost.correct_(took, cost, alive)

    def state_dict(self) -> dict[str, Any]:
        return {"gain": self.cost.gain, "checks": self.checks, "note": self.note}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cost.gain, self.checks, self.note = float(state["gain"]), int(state["checks"]), str(state["note"])

    def _measure(self, make: Callable[[], nn.Module]) -> float:
        """Return nanoseconds of an export, by its ratio to the dense one."""
        compared = self.world.share(self.stopwatch.compare(make()) if self.world.is_main else None)
        assert compared is not None
        dense, settings, device = self.cost.dense, self.settings, self.stopwatch.device
        where = f"{settings.threads} thread{'s' if settings.threads > 1 else ''}" if device == CPU else str(device)
        self.note = (
            f"latency in {settings.runtime}, batch {settings.batch}, {where}: the export takes {compared.ratio:.3f} of "
            f"the dense one's {dense / 1e6:.3g} ms, measured in turns"
            + (f"; this may be wrong: {compared.doubt}" if compared.doubt else "")
        )
        return compared.ratio * dense

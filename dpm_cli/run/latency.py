"""Predict the latency of any set of survivors from a table that the runtime itself filled, and measure real exports.

Every convolution and matrix product is timed alone at a few widths of the whole network, once. What is left of the
measured dense latency (norms, activations, overhead) shrinks with the number of units. Two real exports, the dense
model and the smallest one that is allowed, fix both ends of the prediction; each further measurement corrects it.
"""

import copy
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dpm_cli.engine.distributed import World
from dpm_cli.errors import TargetError
from dpm_cli.export import export_model, open_exported, require_runtime
from dpm_cli.export.probe import clock_for, find_operators, time_operator
from dpm_cli.files import write_text_atomic
from dpm_cli.graph import Cost, Groups, compact_
from dpm_cli.graph.labels import Flags
from dpm_cli.layers.images import Shape
from dpm_cli.measure import Run, flushing_denormals, hardware
from dpm_cli.method.budget import WidthLimits
from dpm_cli.recipe.deployment import Latency

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the units that may leave each group, at which operators are timed
TOLERANCE = 0.02  # of the target: a real export may take so much longer than asked
ATTEMPTS = 5  # to make prediction and measurement agree
SECONDS, LEAST, CALLS = 2.0, 30, 5  # of one comparison, least calls of each, and calls of each in one turn
Table = dict[str, tuple[list[int], list[float]]]  # weight -> its numbers of entries, and nanoseconds, both growing


@dataclass(frozen=True)
class Timed:
    """Holds what was measured once: nanoseconds of operators, and of the dense and the smallest export."""

    table: Table
    dense: float
    lowest: float
    lowest_table: float  # what the table alone says of the smallest export


class LatencyCost:
    """Predicts nanoseconds of one call. It corrects itself by what real exports take."""

    def __init__(self, timed: Timed, units: int) -> None:
        self.timed, self.units = timed, units
        self.gain = 1.0  # what is saved in reality / by the table
        self.correct_(timed.lowest, timed.lowest_table)

    def __str__(self) -> str:
        return "latency"

    def count(self, cost: Cost, alive: Flags) -> int:
        """Return nanoseconds. alive: (units,)"""
        saved = self.timed.dense - table_sum(self.timed.table, self.timed.dense, cost, alive, self.units)
        return max(1, round(self.timed.dense - self.gain * saved))

    def correct_(self, measured: float, predicted: float) -> None:
        """Make a structure cost what its export takes. predicted: by the table alone."""
        saved = self.timed.dense - predicted
        if saved > 0:
            self.gain = max(1e-6, (self.timed.dense - measured) / saved)


def table_sum(table: Table, dense: float, cost: Cost, alive: Flags, units: int) -> float:
    """Add up the nanoseconds of all operators, and those of everything else, which shrinks with the number of units."""
    entries = dict(zip(cost.parameter_names, cost.entries(alive).tolist()))
    operators = sum(float(np.interp(entries[name], *knots)) for name, knots in table.items())
    whole = sum(times[-1] for _, times in table.values())
    return operators + max(0.0, dense - whole) * int(alive.sum()) / units


class Stopwatch:
    """Measures the exports of one model's structures, each in turns with the dense one."""

    def __init__(self, module: nn.Module, groups: Groups, settings: Latency, shape: Shape) -> None:
        """module: dense, in eval mode on the CPU."""
        require_runtime(settings.runtime)
        self.module, self.groups, self.settings = module, groups, settings
        self.images = torch.randn(settings.batch, *shape, generator=torch.Generator().manual_seed(0))
        self._dense: Run | None = None

    def shrink(self, alive: Flags) -> nn.Module:
        """Return a copy with only these units. alive: (units,) of the dense model"""
        slim = copy.deepcopy(self.module)
        compact_(slim, self.groups, alive)
        return slim

    def ratio(self, slim: nn.Module) -> tuple[float, float]:
        """Return the latency of a slim model / of the dense one, and the nanoseconds of the latter, both in turns."""
        self._dense = self._dense or self._open(self.module)
        runs, clock = (self._dense, self._open(slim)), clock_for(self.settings.threads)
        times: tuple[list[int], list[int]] = ([], [])
        end = time.perf_counter() + SECONDS
        with torch.inference_mode(), flushing_denormals():
            while len(times[0]) < LEAST or time.perf_counter() < end:
                for run, own in zip(runs, times):
                    for number in range(CALLS + 1):
                        start = clock()
                        run(self.images)
                        if number:  # the other one has emptied the caches
                            own.append(clock() - start)
        dense, took = (statistics.quantiles(own, n=4, method="inclusive")[0] for own in times)
        return took / dense, dense

    def _open(self, module: nn.Module) -> Run:
        with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
            path = Path(folder) / "model.onnx"
            export_model(module, self.images[:1], format="onnx", path=path, metadata={})
            return open_exported(path, runtime=self.settings.runtime, threads=self.settings.threads)

    def time_all(self, widths: WidthLimits) -> Timed:
        """Time the operators at all shares, and the dense and the smallest export."""
        settings, groups = self.settings, self.groups
        call = time_operator(None, runtime=settings.runtime, threads=settings.threads)
        known: dict[object, float] = {}
        knots: dict[str, dict[int, float]] = {}
        for share in SHARES:
            alive = _leave(groups, widths, share)
            entries = dict(zip(groups.cost.parameter_names, groups.cost.entries(alive).tolist()))
            for name, operator in find_operators(self.shrink(alive), self.images).items():
                if name in entries:
                    if operator not in known:
                        took = time_operator(operator, runtime=settings.runtime, threads=settings.threads)
                        known[operator] = max(0.0, took - call)
                    knots.setdefault(name, {})[entries[name]] = known[operator]
        table = {
            name: (sorted(own), np.maximum.accumulate([own[size] for size in sorted(own)]).tolist())
            for name, own in knots.items()
        }
        lowest = widths.lowest(groups)
        ratio, dense = self.ratio(self.shrink(lowest))
        return Timed(table, dense, ratio * dense, table_sum(table, dense, groups.cost, lowest, groups.units))


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
        table = {str(name): (list(sizes), list(times)) for name, (sizes, times) in values["table"].items()}
        return Timed(table, float(values["dense"]), float(values["lowest"]), float(values["lowest_table"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class Meter:
    """Predicts and checks the latency of one run's model. Only the main process measures; the others are told."""

    def __init__(self, settings: Latency, shape: Shape, world: World) -> None:
        self.settings, self.shape, self.world = settings, shape, world
        self.checks = 0  # made after pruning
        self.note = ""  # what the last export took

    def time_widths(self, module: nn.Module, groups: Groups, widths: WidthLimits) -> LatencyCost:
        """Fill the table, or read it. See `dpm_cli.method.survey`."""
        self.stopwatch = Stopwatch(module, groups, self.settings, self.shape)
        timed = load_or_time(self.stopwatch, widths) if self.world.is_main else None
        shared = self.world.share(timed)
        assert shared is not None
        self.cost = LatencyCost(shared, groups.units)
        return self.cost

    def settle(self, choose: Callable[[], Flags], limit: int) -> None:
        """Export what would be chosen, measure it and correct the prediction, until both agree.

        choose: returns (units,) the survivors that meet the target by the present prediction. limit: nanoseconds.
        """
        groups = self.stopwatch.groups
        for _ in range(ATTEMPTS):
            alive = choose()
            took = self._measure(partial(self.stopwatch.shrink, alive))
            if abs(took - limit) <= TOLERANCE * limit:
                break
            self._correct(took, groups.cost, alive)

    def check(self, model: nn.Module, cost: Cost, alive: Flags, limit: int) -> None:
        """Measure the pruned model. If it is too slow, correct the prediction, so that the target is missed again.

        Raises TargetError if that has not helped several times.
        """
        self.checks += 1
        took = self._measure(lambda: copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval())
        if took <= limit * (1 + TOLERANCE):
            return
        if self.checks > ATTEMPTS:
            raise TargetError(
                f"target latency of {limit / 1e6:.3g} ms was not met, however many units went: {self.note}; "
                "widths that are no multiple of 8 can be slow, so raise prune.round_to, or the target"
            )
        self._correct(took, cost, alive)

    def state_dict(self) -> dict[str, Any]:
        return {"gain": self.cost.gain, "checks": self.checks, "note": self.note}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cost.gain, self.checks, self.note = float(state["gain"]), int(state["checks"]), str(state["note"])

    def _correct(self, took: float, cost: Cost, alive: Flags) -> None:
        timed = self.cost.timed
        self.cost.correct_(took, table_sum(timed.table, timed.dense, cost, alive, self.cost.units))

    def _measure(self, make: Callable[[], nn.Module]) -> float:
        """Return nanoseconds of an export, by its ratio to the dense one."""
        ratio = self.world.share(self.stopwatch.ratio(make())[0] if self.world.is_main else 0.0)
        dense, settings = self.cost.timed.dense, self.settings
        self.note = (
            f"latency in {settings.runtime}, batch {settings.batch}, {settings.threads} thread"
            f"{'s' if settings.threads > 1 else ''}: the export takes {ratio:.3f} of the dense one's "
            f"{dense / 1e6:.3g} ms, measured in turns"
        )
        return ratio * dense

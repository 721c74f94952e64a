"""Predict the latency of any set of survivors from a table of operators, timed at a grid of their widths.

Runtimes compute channels in blocks: a convolution with 8 outputs can take as long as one with 16, and one with 24 as
long as one with 32. So every operator has its own grid of numbers of outputs and inputs. What is left of the measured
dense latency (norms, activations, overhead) shrinks with the number of units. Measurements of real exports scale what
the table says is saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpm_cli.graph import Cost
from dpm_cli.graph.labels import Flags, Ids

Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Nanoseconds of one operator."""

    outputs: Sequence[int]  # growing
    inputs: Sequence[int]  # growing
    times: Sequence[Sequence[float]]  # (outputs, inputs)


@dataclass(frozen=True)
class Timed:
    """Holds what was measured once: nanoseconds of operators, and of the dense and the smallest export."""

    table: Mapping[str, Grid]  # by weight
    dense: float
    lowest: float


class LatencyCost:
    """Predicts nanoseconds of one call. It corrects itself by what real exports take."""

    def __init__(self, timed: Timed, cost: Cost, lowest: Flags) -> None:
        """cost: of the dense model. lowest: (units,) what the smallest export kept."""
        self.dense, self.gain = timed.dense, 1.0  # gain: what is saved in reality / by the table
        self._table, dense = _Table(timed.table, cost), cost.sizes(np.ones(len(lowest), bool))
        self._rest = max(0.0, self.dense - self._table.add_up(dense)) / int(dense.sum())
        self._whole = self._add_up(dense)  # operators alone can take longer than together: runtimes fuse them
        self.correct_(timed.lowest, cost, lowest)

    def __str__(self) -> str:
        return "latency"

    def count(self, cost: Cost, alive: Flags) -> int:
        """Return nanoseconds. alive: (units,)"""
        return max(1, round(self.dense - self.gain * self._saved(cost, alive)))

    def correct_(self, measured: float, cost: Cost, alive: Flags) -> None:
        """Make a structure cost what its export takes. alive: (units,)"""
        saved = self._saved(cost, alive)
        if saved > 0:
            self.gain = max(1e-6, (self.dense - measured) / saved)

    def _saved(self, cost: Cost, alive: Flags) -> float:
        """Return the nanoseconds that the table says are saved."""
        return self._whole - self._add_up(cost.sizes(alive))

    def _add_up(self, sizes: Ids) -> float:
        return self._table.add_up(sizes) + self._rest * int(sizes.sum())


class _Table:
    """Adds up the nanoseconds of all operators, at their present widths."""

    def __init__(self, grids: Mapping[str, Grid], cost: Cost) -> None:
        known = [grids[name] for name in cost.parameter_names if name in grids]
        self._knots = [_pad([grid.outputs for grid in known]), _pad([grid.inputs for grid in known])]
        self._times: Times = np.zeros((len(known), *(knots.shape[1] for knots in self._knots)))
        for own, grid in zip(self._times, known):
            rows, columns = len(grid.outputs), len(grid.inputs)
            own[:] = np.pad(grid.times, [(0, own.shape[0] - rows), (0, own.shape[1] - columns)], "edge")
        axes, factors = cost.parameter_axes, cost.parameter_terms.factors
        own = [number for number, name in enumerate(cost.parameter_names) if name in grids]
        self._rows = [  # (operators,) of each axis in the table of sizes; -1 for an axis that never shrinks
            np.array([factors[i, axes[i].index(axis)] if axis in axes[i] else -1 for i in own], np.int64)
            for axis in (0, 1)
        ]

    def add_up(self, sizes: Ids) -> float:
        """Return nanoseconds. sizes: as of `Cost.sizes`"""
        each = np.arange(len(self._times))
        (row, down), (column, right) = (_place(*axis, sizes) for axis in zip(self._knots, self._rows))
        upper, lower = (
            self._times[each, at, column] * (1 - right) + self._times[each, at, column + 1] * right
            for at in (row, row + 1)
        )
        return float((upper * (1 - down) + lower * down).sum())


def _pad(knots: Sequence[Sequence[int]]) -> Ids:
    """Make (operators, widths) of lists of widths, at least two, by repeating the last ones."""
    most = max([2, *map(len, knots)])
    return np.array([[*own, *[own[-1]] * (most - len(own))] for own in knots], np.int64).reshape(-1, most)


def _place(knots: Ids, rows: Ids, sizes: Ids) -> tuple[Ids, Times]:
    """Return (operators,) the last timed width that is not above the present one, and how far away the next one is."""
    present = np.where(rows < 0, knots[:, -1], sizes[rows])  # (operators,)
    at = np.clip((knots <= present[:, None]).sum(1) - 1, 0, knots.shape[1] - 2)
    low, high = (np.take_along_axis(knots, number[:, None], 1)[:, 0] for number in (at, at + 1))
    return at, np.clip((present - low) / np.maximum(high - low, 1), 0, 1)

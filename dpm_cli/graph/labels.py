"""Labels: an integer for every index of every parameter axis, and what ties them.

Two indices carry tied labels when one cannot be removed without the other. The connected components of all ties are the
units. A label can be *kept*: its whole component then stays, with the reason.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from dpm_cli.graph.sizes import Asking, Number
from dpm_cli.graph.sizes import Flags as Flags
from dpm_cli.graph.sizes import Ids as Ids


class Role(IntEnum):
    """What a parameter entry does for its unit."""

    PRODUCER = 0  # makes the unit's values: conv and linear rows, bare parameters
    NORM = 1  # works channel by channel: normalisation weights, depthwise rows; dies with the producers
    BIAS = 2  # of either; dies with the producers
    CONSUMER = 3  # reads the unit's values: its entries multiply zeros once the unit is dead
    BUFFER = 4  # running statistics, slopes: removed with the unit, never scaled
    READER = 5  # a consumer that must shrink, too: it reads what a dead unit leaves behind, or counts in a sum

    @property
    def is_producing(self) -> bool:
        """Whether it is on the producer side."""
        return self in (Role.PRODUCER, Role.NORM, Role.BIAS)

    @property
    def is_consuming(self) -> bool:
        """Whether it reads the unit's values."""
        return self in (Role.CONSUMER, Role.READER)

    @property
    def is_scaled(self) -> bool:
        """Whether it shrinks with its unit."""
        return self.is_producing or self is Role.READER


@dataclass(frozen=True)
class Labels:
    """The labels along one axis of a tensor, or along a block of axes that must stay rectangular.

    Within a block only one axis tells units apart; along the others all labels are tied. An axis of heads · head
    dimensions split in two has units along the first (heads), other splits along the last.
    """

    ids: Ids  # one axis: (size,); a block: (size, size, ...)
    zero: Flags  # same shape: the value here is exactly zero once the unit is dead
    unit_axis: int = 0  # of `ids`

    def reordered(self, order: Sequence[int]) -> "Labels":
        """Permute the axes: axis `order[i]` becomes axis i."""
        return Labels(self.ids.transpose(order), self.zero.transpose(order), list(order).index(self.unit_axis))

    def taken(self, index: int, axis: int) -> "Labels":
        """Take one index of an axis that does not tell units apart."""
        assert axis != self.unit_axis
        where = (slice(None),) * axis + (index,)
        return Labels(self.ids[where], self.zero[where], self.unit_axis - (axis < self.unit_axis))

    def reduced(self, axis: int) -> "Labels":
        """Drop an axis that does not tell units apart. The result is zero where everything along it was."""
        taken = self.taken(0, axis)
        return Labels(taken.ids, np.asarray(self.zero.all(axis)), taken.unit_axis)

    def resized(self, axis: int, size: int) -> "Labels":
        """Give another size to an axis that does not tell units apart: along it, all labels are tied anyway."""
        one = self.reduced(axis)
        shape = (*self.ids.shape[:axis], size, *self.ids.shape[axis + 1 :])
        ids = np.broadcast_to(np.expand_dims(one.ids, axis), shape)
        return Labels(ids, np.broadcast_to(np.expand_dims(one.zero, axis), shape), self.unit_axis)

    def spread(self, axes: "Axes", block: "Labels", block_axes: "Axes") -> "Labels":
        """Repeat the labels along the other axes of a block that contains these."""
        shape = [size if axis in axes else 1 for axis, size in zip(block_axes, block.ids.shape)]
        ids, zero = (np.broadcast_to(array.reshape(shape), block.ids.shape) for array in (self.ids, self.zero))
        return Labels(ids, zero, block.unit_axis)

    def with_zero(self, zero: Flags | bool) -> "Labels":
        """Return the same labels with other flags, broadcast to their shape."""
        return Labels(self.ids, np.broadcast_to(np.asarray(zero), self.ids.shape), self.unit_axis)


Axes = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its shape and the labels along its axes. An axis without labels has a fixed size."""

    shape: tuple[int, ...]
    labels: dict[Axes, Labels] = field(default_factory=dict)
    constant: bool = False  # made of parameters alone: it does not depend on the input

    @property
    def rank(self) -> int:
        return len(self.shape)

    def axes_of(self, axis: int) -> Axes | None:
        """Return the block of axes that `axis` belongs to, or None if its size is fixed."""
        return next((axes for axes in self.labels if axis % self.rank in axes), None)

    def tells_units_along(self, axis: int) -> bool:
        """Tell whether this axis would lose indices if units were lost."""
        axes = self.axes_of(axis)
        return axes is not None and axes[self.labels[axes].unit_axis] == axis % self.rank

    def units_along(self, axis: int) -> Ids | None:
        """Return the labels that an axis tells apart, one for every index; None if it would lose none: (size,)."""
        axes = self.axes_of(axis)
        if axes is None or not self.tells_units_along(axis):
            return None
        block = self.labels[axes]
        return np.moveaxis(block.ids, block.unit_axis, 0).reshape(self.shape[axis], -1)[:, 0]

    def along(self, axis: int) -> Labels | None:
        """Return the labels of one axis alone; None if it is fixed or part of a larger block."""
        return self.labels.get((axis % self.rank,))

    def without_zeros(self) -> "Value":
        """Return the same labels, none of which is zero once its unit is dead."""
        return Value(self.shape, {axes: labels.with_zero(False) for axes, labels in self.labels.items()})

    def collapsed(self, *gone: int) -> "Value":
        """Shrink these axes to size 1 and drop the labels of every block that they belong to."""
        shape = tuple(1 if axis in gone else size for axis, size in enumerate(self.shape))
        return Value(shape, {axes: labels for axes, labels in self.labels.items() if not set(axes) & set(gone)})

    def resized(self, axis: int, size: int) -> "Value":
        """Give one axis another size. Labels that tell units apart along it are dropped: keep them first."""
        axis %= self.rank
        shape = tuple(size if k == axis else old for k, old in enumerate(self.shape))
        labels: dict[Axes, Labels] = {}
        for axes, block in self.labels.items():
            if axis not in axes:
                labels[axes] = block
            elif axes[block.unit_axis] != axis:
                labels[axes] = block.resized(axes.index(axis), size)
        return Value(shape, labels)

    def reordered(self, order: Sequence[int]) -> "Value":
        """Permute the axes: axis `order[i]` becomes axis i."""
        position = {old: new for new, old in enumerate(order)}
        labels: dict[Axes, Labels] = {}
        for axes, block in self.labels.items():
            moved = [position[axis] for axis in axes]
            labels[tuple(sorted(moved))] = block.reordered(np.argsort(moved).tolist())
        return Value(tuple(self.shape[axis] for axis in order), labels)

    def renamed(self, shape: tuple[int, ...], position: dict[int, int]) -> "Value":
        """Move labels to other axis numbers; drop blocks with an axis that has no new number."""
        return Value(
            shape,
            {
                tuple(position[axis] for axis in axes): labels
                for axes, labels in self.labels.items()
                if all(axis in position for axis in axes)
            },
        )


@dataclass(frozen=True)
class CostTerm:
    """Multiply-accumulates of one operator: coefficient x the numbers of surviving labels of all factors."""

    coefficient: int
    factors: tuple[Ids, ...]
    layer: str = ""  # whose operator it is

    @property
    def total(self) -> int:
        """Return the cost at the sizes that the axes have."""
        return self.coefficient * math.prod(len(ids) for ids in self.factors)


NOT_ZERO = "reads values that are not zero when their channel is (sigmoid, +1 …)"


@dataclass(frozen=True)
class Owner:
    """The axis of a parameter or buffer that labels start … start + size - 1 stand for."""

    tensor: str
    axis: int
    start: int
    size: int

    @property
    def ids(self) -> Ids:
        return np.arange(self.start, self.start + self.size)


class Ties:
    """Collects labels, ties, kept labels and costs while the graph is walked; solved once at the end."""

    def __init__(
        self, batch: int, held: Set[tuple[str, tuple[int, ...]]] = frozenset(), norms: Set[str] = frozenset()
    ) -> None:
        """Start without labels.

        batch: number of inputs in the example. held: (layer, integers) for every integer and list of integers that a
        layer holds. norms: layer norms that can lose channels and go on counting them as zeros.
        """
        self.batch = batch
        self.size = 0
        self.owners: list[Owner] = []
        self.costs: list[CostTerm] = []
        self.numbers: list[Number] = []
        self.asking: list[Asking] = []
        self.held, self.norms = held, norms
        self.layer = ""  # the module whose operators are being read, for reasons
        self._left: list[Ids] = []
        self._right: list[Ids] = []
        self._kept: list[tuple[Ids, str]] = []
        self._roles: list[tuple[Ids, Role]] = []
        self._relied: list[Ids] = []
        self._residual: list[Ids] = []
        self._averaged: list[tuple[Ids, int]] = []  # labels, and the reason that waits for them among those of `_kept`
        self._components: Ids | None = None  # not known, or not any more

    def new(self, size: int) -> Ids:
        """Make labels that no parameter owns."""
        ids = np.arange(self.size, self.size + size)
        self.size += size
        self._components = None
        return ids

    def new_owner(self, tensor: str, axis: int, size: int) -> Ids:
        """Make the labels of one axis of a parameter or buffer."""
        self.owners.append(Owner(tensor, axis, self.size, size))
        return self.new(size)

    def tie(self, left: Labels | Ids, right: Labels | Ids) -> None:
        """Tie label by label: neither can be removed without the other. Shapes broadcast."""
        pair = np.broadcast_arrays(_ids(left), _ids(right))
        self._left.append(pair[0].ravel())
        self._right.append(pair[1].ravel())
        self._components = None

    def are_tied_along(self, ids: Ids, axis: int) -> bool:
        """Tell whether labels along an axis are tied already, like those of a head that was split off before."""
        components = self.components()[ids]
        return bool((components == components.take([0], axis)).all())

    def keep(self, labels: Labels | Ids | None, reason: str) -> None:
        """Keep these labels and with them their units: they cannot be removed."""
        if labels is not None and _ids(labels).size:
            self._kept.append((np.unique(_ids(labels)), f"{self.layer}: {reason}" if self.layer else reason))

    def keep_if_residual(self, labels: Labels | Ids, reason: str) -> None:
        """Note labels that are kept if their units turn out to be the width of a residual stream."""
        self._averaged.append((_ids(labels).ravel(), len(self._kept)))
        self._kept.append((np.zeros(0, np.int64), f"{self.layer}: {reason}" if self.layer else reason))

    def mark_residual(self, value: Value) -> None:
        """Note that this value is added to another that depends on the input, too."""
        self._residual += [labels.ids.ravel() for labels in value.labels.values()]

    def keep_residual(self) -> None:
        """Keep what `keep_if_residual` noted. Call once all graphs are walked."""
        components = self.components()
        is_residual = np.zeros(int(components.max(initial=-1)) + 1, bool)
        for ids in self._residual:
            is_residual[components[ids]] = True
        for ids, slot in self._averaged:
            self._kept[slot] = (np.unique(ids[is_residual[components[ids]]]), self._kept[slot][1])

    def keep_all(self, values: object, reason: str) -> None:
        """Keep every label of a value, or of all values in nested sequences."""
        for value in walk_values(values):
            for labels in value.labels.values():
                self.keep(labels, reason)

    def keep_axis(self, value: Value, axis: int, reason: str) -> None:
        """Keep the labels along one axis, with the rest of their block."""
        axes = value.axes_of(axis)
        if axes is not None:
            self.keep(value.labels[axes], reason)

    def mark(self, labels: Labels | Ids | None, role: Role) -> None:
        """Note what entries with these labels do for their units."""
        if labels is not None:
            self._roles.append((_ids(labels).ravel(), role))

    def rely(self, labels: Labels | Ids) -> None:
        """Note that these weights act channel by channel, so they must be zero once their unit is dead."""
        self._relied.append(_ids(labels).ravel())

    def fix_axis(self, value: Value, axis: int, reason: str) -> None:
        """Keep an axis that must not lose an index, unless another axis of its block tells units apart."""
        if value.tells_units_along(axis):
            self.keep_axis(value, axis, reason)

    def consume(self, labels: Labels | None) -> None:
        """Keep what is not zero when its unit is dead, because these values are summed."""
        if labels is not None and not labels.zero.all():
            self.keep(labels.ids[~labels.zero], NOT_ZERO)

    def read(self, labels: Labels, columns: Labels) -> None:
        """Tie values to the weights that read them, which die with the unit if the values do not."""
        self.tie(labels, columns)
        self.mark(columns, Role.CONSUMER)
        ids, zero, reads_zero = np.broadcast_arrays(columns.ids, columns.zero, labels.zero)
        self.mark(ids[~reads_zero & zero], Role.READER)
        self.keep(ids[~reads_zero & ~zero], NOT_ZERO)

    def cost(self, coefficient: int, *factors: Labels | Ids | int, rows: Labels | None = None) -> None:
        """Count coefficient x product of factors multiply-accumulates.

        rows: of the weight that is used. Its layer bears the cost, even if another one reads it.
        """
        arrays = []
        for factor in factors:
            if isinstance(factor, int):
                coefficient *= factor
            else:
                arrays.append(_ids(factor).ravel())
        self.costs.append(CostTerm(coefficient, tuple(arrays), self._layer_of(rows) or self.layer))

    def _layer_of(self, labels: Labels | None) -> str:
        """Name the layer whose parameter or buffer has these labels; "" if none has."""
        first = int(labels.ids.flat[0]) if labels is not None and labels.ids.size else -1
        place = bisect_right(self.owners, first, key=lambda owner: owner.start) - 1
        if place < 0 or first >= self.owners[place].start + self.owners[place].size:
            return ""
        return self.owners[place].tensor.rpartition(".")[0]

    def cost_without_batch(self, first: int) -> None:
        """Count the costs from number `first` on once per batch, not once per input."""
        for i in range(first, len(self.costs)):
            self.costs[i] = replace(self.costs[i], coefficient=self.costs[i].coefficient * self.batch)

    def made(self) -> Flags:
        """Tell which labels belong to weights that make values: only these can be units. Returns (labels,)."""
        made = np.zeros(self.size, bool)
        for ids, role in self._roles:
            if role is Role.PRODUCER:
                made[ids] = True
        return made

    def touched(self) -> Flags:
        """Tell which labels are tied to any other: (labels,)."""
        touched = np.zeros(self.size, bool)
        for ids in [*self._left, *self._right]:
            touched[ids] = True
        return touched

    def components(self) -> Ids:
        """Number the connected components: (labels,) the component of every label."""
        if self._components is not None:
            return self._components
        left = np.concatenate(self._left) if self._left else np.zeros(0, np.int64)
        right = np.concatenate(self._right) if self._right else np.zeros(0, np.int64)
        graph = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(self.size, self.size))
        self._components = connected_components(graph, directed=False)[1].astype(np.int64)
        return self._components

    def kept(self, components: Ids) -> tuple[Ids, list[str]]:
        """Return (components,) the number of the first reason to keep each, -1 without one; and the reasons."""
        number = np.full(int(components.max(initial=-1)) + 1, -1)
        makes, reads = np.zeros(self.size, bool), np.zeros(self.size, bool)
        for ids, role in self._roles:
            (reads if role.is_consuming else makes)[ids] = True
        for ids in self._relied:
            makes[ids] = True
        both = (np.flatnonzero(makes & reads), "the same weights make and read it")
        kept = [*self._kept, both]
        for i, (ids, _) in reversed(list(enumerate(kept))):  # the first reason is written last
            number[components[ids]] = i
        return number, [reason for _, reason in kept]

    def roles(self) -> npt.NDArray[np.int8]:
        """Return the role of every label: (labels,). A label that reads anywhere is a consumer."""
        roles = np.full(self.size, Role.PRODUCER, np.int8)
        for ids, role in self._roles:
            roles[ids] = np.maximum(roles[ids], role)
        return roles


def walk_values(values: object) -> Iterator[Value]:
    """Yield every value in nested sequences."""
    if isinstance(values, Value):
        yield values
    elif isinstance(values, Iterable) and not isinstance(values, str | bytes):
        for value in values:
            yield from walk_values(value)


def _ids(labels: Labels | Ids) -> Ids:
    return labels.ids if isinstance(labels, Labels) else labels

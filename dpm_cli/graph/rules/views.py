"""The same entries under another shape: views, permutations and expansions."""

import math
from collections.abc import Sequence

import numpy as np

from dpm_cli.graph.labels import Axes, Labels, Ties, Value
from dpm_cli.graph.rules.broadcasting import broadcast
from dpm_cli.graph.rules.registry import Call, rule
from dpm_cli.graph.sizes import Asking, Ids, Merged, Number, Size

ASKING = frozenset("view reshape _unsafe_view unflatten".split())  # for sizes that the code names


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")
def reshape(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    segments = _segments(x.shape, call.shape)
    out: dict[Axes, Labels] = {}
    for axes in x.labels:
        touched = [segment for segment in segments if set(segment[0]) & set(axes)]
        before, after = (sorted(axis for segment in touched for axis in segment[i]) for i in (0, 1))
        merged = [other for other in x.labels if set(other) & set(before)]
        if len(merged) > 1 and not (x.constant and axes == min(merged)):  # of a kernel's axes, the channels may go
            ties.keep(x.labels[axes], "a view merges two sets of channels")
        else:
            out.update(_reshape_block(ties, x, axes, before, call, after))
    value = Value(call.shape, out)
    if call.name in ASKING:
        _note_sizes(ties, x, value, segments)
    return value


def _note_sizes(ties: Ties, x: Value, out: Value, segments: Sequence[tuple[list[int], list[int]]]) -> None:
    """Note which of the sizes that a view asks for count labels, and what they are made of."""
    counted = {axis: ids for axis in range(x.rank) if (ids := x.units_along(axis)) is not None}
    asked, merged = list[Size](), list[Merged]()
    for before, after in segments:
        labelled = [axis for axis in before if axis in counted]
        if labelled and len(after) == 1:
            merged.append(Merged(after[0], before[0], before[-1]))
        elif labelled:
            sizes = [Size(axis, out.shape[axis], out.units_along(axis), labelled[0]) for axis in after]
            is_alone = len(before) == 1 and _is_distinct(counted[before[0]])  # others were merged with a batch, say
            asked += [size for size in sizes if (is_alone if size.counted is None else _is_distinct(size.counted))]
    alone = tuple((axis, ids) for axis, ids in counted.items() if _is_distinct(ids))
    ties.asking.append(Asking(ties.layer, x.rank, alone, out.rank, tuple(asked), tuple(merged)))


def _is_distinct(ids: Ids) -> bool:
    return len(np.unique(ids)) == len(ids)


def _segments(left: tuple[int, ...], right: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of the same number of elements into the shortest runs of axes with equal products."""
    segments, i, j = [], 0, 0
    while i < len(left) or j < len(right):
        before, after = ([i] if i < len(left) else []), ([j] if j < len(right) else [])
        i, j = i + len(before), j + len(after)
        a, b = math.prod(left[k] for k in before), math.prod(right[k] for k in after)
        while a != b:
            if (a < b and i < len(left)) or j == len(right):
                before.append(i)
                a, i = a * left[i], i + 1
            else:
                after.append(j)
                b, j = b * right[j], j + 1
        segments.append((before, after))
    return segments


def _reshape_block(
    ties: Ties, x: Value, axes: Axes, before: list[int], call: Call, after: list[int]
) -> dict[Axes, Labels]:
    """Move the labels of one block from the axes `before` a view to the axes `after` it."""
    labels, shape = x.labels[axes], call.shape
    spread = [x.shape[axis] if axis in axes else 1 for axis in before]
    sizes, target = [x.shape[axis] for axis in before], [shape[axis] for axis in after]
    ids = np.broadcast_to(labels.ids.reshape(spread), sizes).reshape(target)
    zero = np.broadcast_to(labels.zero.reshape(spread), sizes).reshape(target)
    varies = [
        bool((ids != ids.take([0], k)).any()) or (shape[axis] == x.shape[axes[0]] and len(after) == 1)
        for k, axis in enumerate(after)
    ]
    index = tuple(slice(None) if keep else 0 for keep in varies)
    moved = tuple(axis for axis, keep in zip(after, varies) if keep)
    if not moved:
        ties.keep(labels, "its axis vanishes in a view")
        return {}
    if any(not keep and size > 1 for keep, size in zip(varies, target)):
        zero = np.broadcast_to(
            zero.all(tuple(k for k, keep in enumerate(varies) if not keep), keepdims=True), ids.shape
        )
    ids, zero = ids[index], zero[index]
    if len(moved) == 1:
        if len(ids) == len(labels.ids):
            ties.numbers.append(Number(ties.layer, (labels.ids,), "width"))
        return {moved: Labels(ids, zero)}
    if len(axes) == 1:
        # An axis split in several must stay rectangular: whole heads go, or else the same trailing index everywhere.
        makes_heads = shape[moved[-1]] in call.head_dims or ties.are_tied_along(ids, -1)
        unit_axis = len(moved) - (2 if makes_heads else 1)
        by_unit = np.moveaxis(ids, unit_axis, 0).reshape(ids.shape[unit_axis], -1)
        ties.tie(by_unit[:, :1], by_unit)
        if makes_heads:
            heads = np.unique(by_unit[:, 0])
            ties.numbers.append(Number(ties.layer, (heads,), "heads"))
            ties.numbers.append(Number(ties.layer, (np.repeat(heads, shape[moved[-1]]),)))
        return {moved: Labels(ids, zero, unit_axis)}
    positions = np.arange(labels.ids.shape[labels.unit_axis])
    positions = positions.reshape([-1 if k == labels.unit_axis else 1 for k in range(labels.ids.ndim)])
    positions = np.broadcast_to(positions, labels.ids.shape).reshape(spread)
    positions = np.broadcast_to(positions, sizes).reshape(target)[index]
    along = [k for k in range(positions.ndim) if (positions != positions.take([0], k)).any()]
    if len(along) != 1:
        ties.keep(labels, "a view mixes the axes of a block")
        return {}
    return {moved: Labels(ids, zero, along[0])}


@rule("permute", "transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "adjoint", "movedim")
def permute(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    order = list(range(x.rank))
    match call.name:
        case "permute":
            order = [axis % x.rank for axis in call.args[1]]
        case "transpose" | "swapaxes" | "swapdims":
            i, j = (axis % x.rank for axis in call.args[1:3])
            order[i], order[j] = j, i
        case "t" | "numpy_T":
            order.reverse()
        case "mT" | "adjoint":
            order[-1], order[-2] = order[-2], order[-1]
        case _:
            source, target = ([axes] if isinstance(axes, int) else list(axes) for axes in call.args[1:3])
            rest = [axis for axis in order if axis not in {axis % x.rank for axis in source}]
            for to, axis in sorted((to % x.rank, axis % x.rank) for to, axis in zip(target, source)):
                rest.insert(to, axis)
            order = rest
    return x.reordered(order)


@rule("unsqueeze")
def unsqueeze(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    axis = call.args[1] % (x.rank + 1)
    return x.renamed(call.shape, {old: old + (old >= axis) for old in range(x.rank)})


@rule("squeeze")
def squeeze(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    dims = call.args[1] if len(call.args) > 1 else range(x.rank)
    gone = {axis % x.rank for axis in ([dims] if isinstance(dims, int) else dims)}
    gone = {axis for axis in gone if x.shape[axis] == 1}
    left = [axis for axis in range(x.rank) if axis not in gone]
    for axis in gone:
        ties.keep_axis(x, axis, "squeezed away")
    return x.renamed(call.shape, {old: new for new, old in enumerate(left)})


@rule("expand", "broadcast_to")
def expand(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    value = broadcast(ties, x, call.shape)
    if call.name == "expand":
        _note_sizes(ties, x, value, [([axis], [axis + value.rank - x.rank]) for axis in range(x.rank)])
    return Value(call.shape, value.labels)


@rule("repeat")
def repeat(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    times = call.args[1]
    offset = len(times) - x.rank
    repeated = {axis for axis in range(x.rank) if times[axis + offset] != 1}
    for axis in repeated:
        ties.keep_axis(x, axis, "repeated along this axis")
    position = {axis: axis + offset for axis in range(x.rank) if axis not in repeated}
    return x.renamed(call.shape, position)


@rule("expand_as")
def expand_as(ties: Ties, call: Call) -> Value:
    x, other = call.args[:2]
    value = broadcast(ties, x, call.shape)
    followed = {
        axes: labels.with_zero(False)
        for axes, labels in other.labels.items()
        if all(value.shape[axis] == 1 and value.axes_of(axis) is None for axis in axes)
    }
    return Value(call.shape, {**value.labels, **followed})

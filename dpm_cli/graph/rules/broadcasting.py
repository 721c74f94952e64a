"""Join the labels of operands that meet index by index, aligned axis by axis from the right."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dpm_cli.graph.labels import Axes, Labels, Ties, Value


def combine(
    ties: Ties, shape: tuple[int, ...], values: Sequence[Value], *, zero: str, judged: Sequence[Value] | None = None
) -> Value:
    """Align operands axis by axis from the right and tie the labels that meet.

    zero: the output is zero where "all" of the judged operands are, where "any" is, or "never".
    """
    judged = values if judged is None else judged
    if not all(value.constant for value in values):
        for value in values:
            for labels in value.labels.values() if value.constant else ():
                ties.rely(labels)
    aligned = _align_blocks([broadcast(ties, value, shape) for value in values])
    ids: dict[Axes, Labels] = {}
    for value in aligned:
        for axes, labels in value.labels.items():
            if axes in ids:
                ties.tie(ids[axes], labels)
            elif _is_free_beside(ties, axes, labels, ids):
                ids[axes] = labels
    for axes, labels in ids.items():
        axis = axes[labels.unit_axis]  # the others lose no index
        for value in aligned:
            if value.shape[axis] == shape[axis] > 1 and value.axes_of(axis) is None:
                ties.keep(labels, "meets an axis of fixed size")
    out: dict[Axes, Labels] = {}
    for axes, labels in ids.items():
        flags = [
            value.labels[axes].zero if axes in value.labels else np.zeros(labels.ids.shape, bool)
            for value, original in zip(aligned, values)
            if any(original is one for one in judged)
        ]
        match zero:
            case "all":
                out[axes] = labels.with_zero(np.logical_and.reduce(flags))
            case "any":
                out[axes] = labels.with_zero(np.logical_or.reduce(flags))
            case _:
                out[axes] = labels.with_zero(False)
    return Value(shape, out)


def _is_free_beside(ties: Ties, axes: Axes, labels: Labels, ids: dict[Axes, Labels]) -> bool:
    """Tell whether a block shares no axis with others; else keep, and drop, those that lose indices of a shared axis.

    A weight for every head dimension, say, is kept, but not the heads that it meets.
    """
    reason = "axes are grouped differently in two operands"
    clashing = [other for other in ids if set(axes) & set(other)]
    for other in clashing:
        if other[ids[other].unit_axis] in axes:
            ties.keep(ids.pop(other), reason)
    clashing = [other for other in clashing if other in ids]
    if clashing:
        ties.keep(labels, reason)
    return not clashing


def _align_blocks(values: list[Value]) -> list[Value]:
    """Spread labels over a block of another operand that contains their axes (heads against heads · dimensions)."""
    blocks = {axes: labels for value in values for axes, labels in value.labels.items() if len(axes) > 1}
    aligned = []
    for value in values:
        labels: dict[Axes, Labels] = {}
        for axes, own in value.labels.items():
            block = next((other for other in blocks if set(axes) < set(other)), None)
            if block is None or axes[own.unit_axis] != block[blocks[block].unit_axis]:
                labels[axes] = own
            else:
                labels[block] = own.spread(axes, blocks[block], block)
        aligned.append(replace(value, labels=labels))
    return aligned


def broadcast(ties: Ties, value: Value, shape: tuple[int, ...]) -> Value:
    """Add leading axes of size 1; keep labels of axes that are stretched."""
    offset = len(shape) - value.rank
    labels: dict[Axes, Labels] = {}
    for axes, block in value.labels.items():
        if any(value.shape[axis] != shape[axis + offset] for axis in axes):
            ties.keep(block, "one channel serves all channels of another tensor")
        else:
            labels[tuple(axis + offset for axis in axes)] = block
    return Value((1,) * offset + value.shape, labels)

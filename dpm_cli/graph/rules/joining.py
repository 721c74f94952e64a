"""Joining tensors along an axis, and taking them apart."""

from dataclasses import replace

import numpy as np

from dpm_cli.graph.labels import Labels, Ties, Value, walk_values
from dpm_cli.graph.rules.broadcasting import combine
from dpm_cli.graph.rules.registry import Call, rule
from dpm_cli.graph.sizes import Asking, Number, Size


@rule("cat", "concat", "concatenate")
def concatenate(ties: Ties, call: Call) -> Value:
    axis = (call.args[1] if len(call.args) > 1 else 0) % len(call.shape)
    parts = [part for part in call.args[0] if part.shape != (0,)]  # torch lets such a one be concatenated to anything
    within = {part.axes_of(axis) for part in parts}
    if len(within) == 1 and None not in within and not any(part.tells_units_along(axis) for part in parts):
        return combine(ties, call.shape, [part.resized(axis, call.shape[axis]) for part in parts], zero="all")
    ids, zero, labelled = [], [], False
    for part in parts:
        labels = part.along(axis)
        if labels is None:
            ties.keep_axis(part, axis, "a block of axes is concatenated")
            fixed = ties.new(part.shape[axis])
            ties.keep(fixed, "concatenated with channels of fixed number")
            labels = Labels(fixed, np.zeros(part.shape[axis], bool))
        else:
            labelled = True
        ids.append(labels.ids)
        zero.append(labels.zero)
    rest = tuple(1 if k == axis else size for k, size in enumerate(call.shape))
    out = combine(ties, rest, [part.collapsed(axis) for part in parts], zero="all").labels
    if labelled:
        out[(axis,)] = Labels(np.concatenate(ids), np.concatenate(zero))
    return Value(call.shape, out)


@rule("hstack")
def concatenate_columns(ties: Ties, call: Call) -> Value | list[Value]:
    return concatenate(ties, replace(call, args=(call.args[0], min(1, len(call.shape) - 1))))


@rule("stack")
def stack(ties: Ties, call: Call) -> Value:
    parts, axis = call.args[0], (call.args[1] if len(call.args) > 1 else 0) % len(call.shape)
    merged = combine(ties, parts[0].shape, parts, zero="all")
    return merged.renamed(call.shape, {old: old + (old >= axis) for old in range(merged.rank)})


@rule("chunk", "split", "split_with_sizes", "tensor_split")
def split(ties: Ties, call: Call) -> list[Value]:
    x: Value = call.args[0]
    axis = (call.args[2] if len(call.args) > 2 else 0) % x.rank
    sizes = [shape[axis] for shape in call.shapes]
    labels = x.along(axis)
    if labels is None:
        ties.fix_axis(x, axis, "a block of axes is split")
        return [x.resized(axis, size) for size in sizes]
    if len(sizes) > 1 and (ties.layer, tuple(sizes)) in ties.held and call.name.startswith("split"):
        ties.numbers.append(Number(ties.layer, tuple(np.split(labels.ids, np.cumsum(sizes)[:-1]))))
    elif len(set(sizes)) > 1 and all((ties.layer, (size,)) in ties.held for size in sizes):
        ties.numbers += [Number(ties.layer, (part,)) for part in np.split(labels.ids, np.cumsum(sizes)[:-1])]
    elif len(set(sizes)) > 1:
        ties.keep(labels, "split into unequal parts")
    else:
        parts = labels.ids.reshape(len(sizes), -1)
        ties.tie(parts[:1], parts)  # the parts must stay equal
        if call.name == "split":
            ties.numbers += [Number(ties.layer, (parts[0],)), Number(ties.layer, (labels.ids,))]
    if call.name.startswith("split"):
        parts_of = np.split(labels.ids, np.cumsum(sizes)[:-1])
        asked = tuple(Size(i, len(part), part, axis) for i, part in enumerate(parts_of))
        ties.asking.append(Asking(ties.layer, x.rank, ((axis, labels.ids),), 0, asked))
    rest = {axes: block for axes, block in x.labels.items() if axis not in axes}
    outputs, start = [], 0
    for shape, size in zip(call.shapes, sizes):
        own = dict(rest)
        own[(axis,)] = Labels(labels.ids[start : start + size], labels.zero[start : start + size])
        outputs.append(Value(shape, own))
        start += size
    return outputs


@rule("glu")
def gated_linear_unit(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    halves = replace(call, name="chunk", args=(x, 2, call.args[1]), shapes=(call.shape, call.shape))
    values, gates = walk_values(split(ties, halves))
    return combine(ties, call.shape, [values, gates.without_zeros()], zero="any")


@rule("unbind")
def unbind(ties: Ties, call: Call) -> list[Value]:
    x: Value = call.args[0]
    axis = (call.args[1] if len(call.args) > 1 else 0) % x.rank
    return [_take(ties, x, shape, axis, i) for i, shape in enumerate(call.shapes)]


@rule("select")
def select(ties: Ties, call: Call) -> Value:
    x, axis, index = call.args[:3]
    return _take(ties, x, call.shape, axis % x.rank, index)


def _take(ties: Ties, x: Value, shape: tuple[int, ...], axis: int, index: int) -> Value:
    """Take one index of an axis; its units stay if the axis tells them apart."""
    position = {old: old - (old > axis) for old in range(x.rank) if old != axis}
    taken = x.renamed(shape, position)
    block = x.axes_of(axis)
    if block is not None and x.tells_units_along(axis):
        ties.keep(x.labels[block], "one channel is picked by its number")
    elif block is not None:
        taken.labels[tuple(position[k] for k in block if k != axis)] = x.labels[block].taken(index, block.index(axis))
    return taken


@rule("slice")
def slice_axis(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    axis = (call.args[1] if len(call.args) > 1 else 0) % x.rank
    if call.shape[axis] == x.shape[axis]:
        return Value(x.shape, x.labels)
    ties.fix_axis(x, axis, "sliced by numbers")
    return x.resized(axis, call.shape[axis])

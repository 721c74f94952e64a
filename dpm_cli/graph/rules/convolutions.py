"""Convolutions: plain, grouped, depthwise and transposed."""

import math

import numpy as np

from dpm_cli.graph.labels import Labels, Role, Ties, Value
from dpm_cli.graph.rules.registry import Call, keep_whole, rule
from dpm_cli.graph.rules.weights import contract, keep_both, with_bias


@rule("conv1d", "conv2d", "conv3d")
def convolution(ties: Ties, call: Call) -> Value | list[Value]:
    x, weight, bias, _stride, _padding, _dilation, groups = call.args[:7]
    return _convolve(ties, call, x, weight, bias, groups)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(ties: Ties, call: Call) -> Value | list[Value]:
    x, weight, bias, _stride, _padding, _output_padding, groups = call.args[:7]
    if groups == 1:
        swapped = weight.reordered([1, 0, *range(2, weight.rank)])
        return _convolve(ties, call, x, swapped, bias, 1, positions=math.prod(x.shape[2:]))
    if weight.shape[1] == 1:  # depthwise: row c makes output channel c
        return _convolve(ties, call, x, weight, bias, groups, positions=math.prod(x.shape[2:]))
    return _convolve_transposed_in_groups(ties, call, x, weight, bias, groups)


def _convolve_transposed_in_groups(
    ties: Ties, call: Call, x: Value, weight: Value, bias: Value | None, groups: int
) -> Value | list[Value]:
    """Label a weight whose row r reads input channel r, and whose columns make the outputs of r's conv group."""
    channels, rows, columns = x.along(1), weight.along(0), weight.along(1)
    if x.rank != weight.rank or rows is None or columns is None:
        return keep_whole(ties, call, "grouped transposed convolution")
    for axis in range(2, weight.rank):
        ties.keep_axis(weight, axis, "kernel size")
        ties.keep_axis(x, axis, "convolved along this axis")
    ties.keep_axis(x, 0, "a set of channels serves as the batch")
    if channels is None:
        ties.keep_axis(x, 1, "convolution over a block of axes")
    if groups == weight.shape[0]:  # depthwise with several outputs per channel, which stay or go together
        ties.keep(columns, "depthwise")
        if channels:
            ties.tie(channels, rows)
        else:
            ties.keep(rows, "depthwise convolution over a fixed number of channels")
        ties.mark(rows, Role.NORM)
        made = Labels(rows.ids.repeat(weight.shape[1]), rows.zero.repeat(weight.shape[1]))
    else:  # every conv group must lose the same index, of its inputs and of its outputs
        contract(ties, channels, rows)
        by_group = rows.ids.reshape(groups, -1)
        ties.tie(by_group[:1], by_group)
        ties.mark(columns, Role.PRODUCER)
        made = Labels(np.tile(columns.ids, groups), np.tile(columns.zero, groups))
    ties.cost(call.shape[0] * math.prod(x.shape[2:]) * math.prod(weight.shape[2:]), rows, columns)
    return with_bias(ties, Value(call.shape, {(1,): made}), bias, 1)


def _convolve(
    ties: Ties, call: Call, x: Value, weight: Value, bias: Value | None, groups: int, positions: int | None = None
) -> Value | list[Value]:
    if x.rank != weight.rank:
        return keep_whole(ties, call, "convolution of an input without a batch axis")
    batch = _take_batch(ties, x)
    for axis in range(2, weight.rank):
        ties.keep_axis(weight, axis, "kernel size")
        ties.keep_axis(x, axis, "convolved along this axis")
    channels, rows, columns = x.along(1), weight.along(0), weight.along(1)
    if channels is None:
        ties.fix_axis(x, 1, "convolution over a block of axes")
    if groups == 1:
        contract(ties, channels, columns)
    elif weight.shape[1] == 1:
        ties.keep(columns.ids if columns else None, "depthwise")
        if rows and channels:
            ties.tie(channels.ids[:, None], rows.ids.reshape(groups, -1))
        else:
            keep_both(ties, channels, rows, "depthwise convolution over a fixed number of channels")
    else:
        # Every conv group must lose the same index, of its inputs and of its outputs.
        if channels and columns:
            grouped = Labels(channels.ids.reshape(groups, -1), channels.zero.reshape(groups, -1))
            ties.read(grouped, Labels(columns.ids[None], columns.zero[None]))
        else:
            keep_both(ties, channels, columns, "grouped convolution over a fixed number of channels")
        if rows:
            by_group = rows.ids.reshape(groups, -1)
            ties.tie(by_group[:1], by_group)
    positions = math.prod(call.shape[2:]) if positions is None else positions
    places, inputs = positions * math.prod(weight.shape[2:]), batch or call.shape[0]
    ties.cost(places, inputs, rows or weight.shape[0], columns or weight.shape[1], rows=rows)
    ties.mark(rows, Role.NORM if groups > 1 and weight.shape[1] == 1 else Role.PRODUCER)
    out = Value(call.shape, {(1,): rows} if rows else {})
    if batch:
        out.labels[(0,)] = batch.with_zero(batch.zero & (bias is None))
    return with_bias(ties, out, bias, 1)


def _take_batch(ties: Ties, x: Value) -> Labels | None:
    """Return the labels along the batch axis of heads that are convolved one by one; others are kept."""
    axes = x.axes_of(0)
    if axes is None or not x.tells_units_along(0) or not set(axes) <= {0, 1}:
        ties.keep_axis(x, 0, "a set of channels serves as the batch")
        return None
    return x.labels[axes].reduced(1) if len(axes) > 1 else x.labels[axes]

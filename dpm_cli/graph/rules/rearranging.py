"""Entries moved to other positions, and padding around them."""

import numpy as np

from dpm_cli.graph.labels import Axes, Labels, Ties, Value
from dpm_cli.graph.rules.registry import Call, rule


@rule("roll", "flip")
def moves_positions(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    out = Value(x.shape, x.labels)
    for axis in call.args[-1] or range(x.rank):
        ties.fix_axis(x, axis, f"{call.name} along this axis")
        out = out.resized(axis, x.shape[axis])
    return out


@rule("pad", "constant_pad_nd")
def pad(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    value = call.args[3] if call.name == "pad" and len(call.args) > 3 else call.args[2] if len(call.args) > 2 else 0
    constant = call.name != "pad" or call.args[2] == "constant"
    padded = {x.rank - 1 - i // 2 for i, amount in enumerate(call.args[1]) if amount}
    labels: dict[Axes, Labels] = {}
    for axes, block in x.labels.items():
        if set(axes) & padded:
            amounts = call.args[1][2 * (x.rank - 1 - axes[0]) :][:2]
            if len(axes) > 1 or not constant or min(amounts) < 0:
                ties.keep(block, "its axis is padded")
                continue
            labels[axes] = _between_fixed(ties, block.with_zero(block.zero & (not value or len(padded) == 1)), *amounts)
        else:
            # The padded border of a dead channel is not zero, and removing the channel removes the border.
            labels[axes] = block.with_zero(False) if constant and value else block
    return Value(call.shape, labels)


def _between_fixed(ties: Ties, labels: Labels, before: int, after: int) -> Labels:
    """Surround the labels of an axis by some that stay: what is put there has a fixed size."""
    fixed = ties.new(before + after)
    ties.keep(fixed, "meets padding of fixed size")
    ids = np.concatenate([fixed[:before], labels.ids, fixed[before:]])
    return Labels(ids, np.concatenate([np.zeros(before, bool), labels.zero, np.zeros(after, bool)]))


@rule("pixel_shuffle")
def pixel_shuffle(ties: Ties, call: Call) -> Value:
    x, factor = call.args[:2]
    channels = x.along(x.rank - 3)
    ties.keep_all(x.collapsed(x.rank - 3), "shuffled in space")
    if channels is None:
        ties.keep_axis(x, x.rank - 3, "shuffled in space")
        return Value(call.shape)
    ids, zero = (array.reshape(-1, factor * factor) for array in (channels.ids, channels.zero))
    ties.tie(ids[:, :1], ids)
    return Value(call.shape, {(x.rank - 3,): Labels(ids[:, 0], zero.all(1))})


@rule("pixel_unshuffle")
def pixel_unshuffle(ties: Ties, call: Call) -> Value:
    x, factor = call.args[:2]
    channels = x.along(x.rank - 3)
    ties.keep_all(x.collapsed(x.rank - 3), "shuffled in space")
    if channels is None:
        ties.keep_axis(x, x.rank - 3, "shuffled in space")
        return Value(call.shape)
    ids, zero = (array.repeat(factor * factor) for array in (channels.ids, channels.zero))
    return Value(call.shape, {(x.rank - 3,): Labels(ids, zero)})


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(ties: Ties, call: Call) -> Value:
    x, groups = call.args[:2]
    channels = x.along(1)
    if channels is None:
        ties.keep_axis(x, 1, "channel shuffle over a block of axes")
        return Value(x.shape, {axes: labels for axes, labels in x.labels.items() if 1 not in axes})
    ids, zero = (array.reshape(groups, -1) for array in (channels.ids, channels.zero))
    ties.tie(ids[:1], ids)
    return Value(x.shape, {**x.labels, (1,): Labels(ids.T.ravel(), zero.T.ravel())})

"""Normalisation, by channel or over an axis, and softmax."""

from dataclasses import replace

from dpm_cli.graph.labels import Role, Ties, Value
from dpm_cli.graph.rules.registry import Call, first_of, keep_whole, rule
from dpm_cli.graph.sizes import Number


@rule("batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_native_batch_norm_legit")
def batch_norm(ties: Ties, call: Call) -> Value | list[Value]:
    x, weight, bias, mean, variance = call.args[:5]
    uses_batch_statistics = call.name == "batch_norm" and bool(call.args[5])
    if uses_batch_statistics:  # of a weight, say
        _keep_but_channels(ties, x)
    out = _normalise_channels(ties, call, x, weight, bias, stays_zero=uses_batch_statistics)
    _follow_channels(ties, x, mean, variance)
    return first_of(call, out)


@rule("instance_norm")
def instance_norm(ties: Ties, call: Call) -> Value:
    x, weight, bias, mean, variance, use_input_statistics = call.args[:6]
    _keep_but_channels(ties, x)
    _follow_channels(ties, x, mean, variance)
    return _normalise_channels(ties, call, x, weight, bias, stays_zero=bool(use_input_statistics))


def _keep_but_channels(ties: Ties, x: Value) -> None:
    """Keep what is averaged over: weights that are standardised have labels along all axes."""
    for axes, labels in x.labels.items():
        if axes != (1,):
            ties.keep(labels, "weight standardisation: losing an index changes the statistics of the others")


@rule("group_norm")
def group_norm(ties: Ties, call: Call) -> Value:
    x, groups, weight, bias = call.args[:4]
    channels = x.along(1)
    if groups == 1 or channels is None:
        ties.keep_axis(x, 1, "group norm: losing a channel changes the statistics of the others")
    elif groups != x.shape[1]:  # whole groups can go
        by_group = channels.ids.reshape(groups, -1)
        ties.tie(by_group[:, :1], by_group)
        ties.numbers.append(Number(ties.layer, (by_group[:, 0],)))
    return _normalise_channels(ties, call, x, weight, bias, stays_zero=True)


@rule("layer_norm", "rms_norm")
def layer_norm(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    normalised = call.args[1]
    first = x.rank - len(normalised)
    if ties.layer in ties.norms and x.along(-1) and first == x.rank - 1:
        return _normalise_remaining(ties, x, *call.args[2:4])
    for axis in range(first, x.rank):
        ties.fix_axis(x, axis, "layer norm: losing a channel changes the statistics of the others")
    ties.keep_all(call.args[2:4], "layer norm: losing a channel changes the statistics of the others")
    return x.without_zeros()


def _normalise_remaining(ties: Ties, x: Value, weight: Value, bias: Value) -> Value:
    """Let a layer norm go on counting lost channels, which is exact because they are zero.

    The width of a residual stream is kept nevertheless, unless the user wants it pruned: every norm would count.
    """
    channels = x.labels[(x.rank - 1,)]
    ties.keep_if_residual(channels, "layer norm: losing a channel changes the statistics of the others")
    ties.consume(channels)
    for parameter, role in ((weight, Role.NORM), (bias, Role.BIAS)):
        ties.tie(channels, parameter.labels[(0,)])
        ties.mark(parameter.labels[(0,)], role)
    out = x.without_zeros()
    return replace(out, labels={**out.labels, (x.rank - 1,): channels.with_zero(True)})


def _normalise_channels(
    ties: Ties, call: Call, x: Value, weight: Value | None, bias: Value | None, *, stays_zero: bool
) -> Value:
    """Normalise axis 1 channel by channel. A dead weight and bias give zero, whatever the statistics."""
    channels = x.along(1)
    for parameter, role in ((weight, Role.NORM), (bias, Role.BIAS)):
        if parameter is None:
            continue
        if channels and parameter.along(0):
            ties.tie(channels, parameter.labels[(0,)])
        else:
            ties.keep_axis(parameter, 0, "normalises a fixed number of channels")
            ties.keep(channels, "normalised by a fixed number of weights")
        ties.mark(parameter.along(0), role)
    if channels is None:
        ties.keep_axis(x, 1, "normalised over a block of axes")
    labels = x.without_zeros().labels
    if channels:
        labels[(1,)] = channels.with_zero(True) if weight and bias else channels.with_zero(stays_zero & channels.zero)
    return Value(call.shape, labels)


def _follow_channels(ties: Ties, x: Value, *buffers: Value | None) -> None:
    """Tie running statistics to the channels that they describe."""
    channels = x.along(1)
    for buffer in buffers:
        labels = buffer.along(0) if buffer else None
        if channels and labels:
            ties.tie(channels, labels)
        ties.mark(labels, Role.BUFFER)
        if channels is None:
            ties.keep(labels, "statistics of a fixed number of channels")


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def softmax(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    axis = call.args[1]
    ties.fix_axis(x, axis, "softmax over this axis")
    return x.without_zeros()


@rule("_weight_norm")
def weight_norm(ties: Ties, call: Call) -> Value | list[Value]:
    """Label g · v / ‖v‖, with a norm for every index of one axis (arXiv 1602.07868)."""
    direction, gain, axis = call.args[:3]
    rows, gains = direction.along(axis), gain.along(axis)
    if rows is None or gains is None:
        return keep_whole(ties, call, "weight norm over all axes")
    ties.tie(rows, gains)
    ties.mark(gains, Role.PRODUCER)
    ties.mark(rows, Role.BUFFER)  # a row dies by its gain, because 0 / 0 is not 0
    for axes, labels in direction.labels.items():
        if axes != (axis % direction.rank,):
            ties.consume(labels)
            ties.mark(labels, Role.READER)  # or the norm would change
    return Value(call.shape, direction.labels)

"""One rule per operator: which labels it ties, which its output carries, which it keeps, what it costs.

An operator without a rule keeps whatever it touches, so a missing rule costs prunable units, never correctness.

Soundness rests on two facts that every rule maintains. An axis without labels has a fixed size, so a label that meets
one is kept. And `Labels.zero` says whether a value is exactly zero once its unit is dead; a contraction over values
that are not (after a sigmoid, say) keeps them, because removing them would change the result.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dpm_cli.graph.labels import Axes, Ids, Labels, Number, Role, Ties, Value, walk_values


@dataclass(frozen=True)
class Call:
    """One operator call: arguments in schema order with defaults filled in, tensors as `Value`s."""

    name: str  # without namespace, overload and trailing underscore: "conv2d", "add"
    args: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the outputs
    macs: Callable[[], int]  # at the sizes that it has; slow
    head_dims: frozenset[int] = frozenset()  # of a view: sizes that attention contracts further on

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]


NO_RULE = "has no pruning rule"

Rule = Callable[[Ties, Call], "Value | list[Value]"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def apply_rule(ties: Ties, call: Call) -> Value | list[Value]:
    """The labels of the outputs. Unknown operators keep every label that they touch."""
    known = RULES.get(call.name)
    if known is not None:
        return known(ties, call)
    return _keep_whole(ties, call, f"operator {call.name} {NO_RULE}")


def _keep_whole(ties: Ties, call: Call, reason: str) -> Value | list[Value]:
    """Nothing that this call touches can be removed."""
    ties.keep_all(call.args, reason)
    ties.cost(call.macs())
    return [Value(shape) for shape in call.shapes] if len(call.shapes) > 1 else Value(call.shape)


# ---------------------------------------------------------------------------------------------- contractions


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
    """Row r of the weight reads input channel r; its columns make the outputs of r's conv group."""
    channels, rows, columns = x.along(1), weight.along(0), weight.along(1)
    if x.rank != weight.rank or rows is None or columns is None:
        return _keep_whole(ties, call, "grouped transposed convolution")
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
        _contract(ties, channels, rows)
        by_group = rows.ids.reshape(groups, -1)
        ties.tie(by_group[:1], by_group)
        ties.mark(columns, Role.PRODUCER)
        made = Labels(np.tile(columns.ids, groups), np.tile(columns.zero, groups))
    ties.cost(call.shape[0] * math.prod(x.shape[2:]) * math.prod(weight.shape[2:]), rows, columns)
    return _with_bias(ties, Value(call.shape, {(1,): made}), bias, 1)


def _convolve(
    ties: Ties, call: Call, x: Value, weight: Value, bias: Value | None, groups: int, positions: int | None = None
) -> Value | list[Value]:
    if x.rank != weight.rank:
        return _keep_whole(ties, call, "convolution of an input without a batch axis")
    ties.keep_axis(x, 0, "a set of channels serves as the batch")
    for axis in range(2, weight.rank):
        ties.keep_axis(weight, axis, "kernel size")
        ties.keep_axis(x, axis, "convolved along this axis")
    channels, rows, columns = x.along(1), weight.along(0), weight.along(1)
    if channels is None:
        ties.keep_axis(x, 1, "convolution over a block of axes")
    if groups == 1:
        _contract(ties, channels, columns)
    elif weight.shape[1] == 1:
        ties.keep(columns.ids if columns else None, "depthwise")
        if rows and channels:
            ties.tie(channels.ids[:, None], rows.ids.reshape(groups, -1))
        else:
            _keep_both(ties, channels, rows, "depthwise convolution over a fixed number of channels")
    else:
        # Every conv group must lose the same index, of its inputs and of its outputs.
        if channels and columns:
            grouped = Labels(channels.ids.reshape(groups, -1), channels.zero.reshape(groups, -1))
            ties.tie(grouped.ids, columns.ids[None])
            ties.consume(grouped)
            ties.mark(columns, Role.CONSUMER)
        else:
            _keep_both(ties, channels, columns, "grouped convolution over a fixed number of channels")
        if rows:
            by_group = rows.ids.reshape(groups, -1)
            ties.tie(by_group[:1], by_group)
    positions = math.prod(call.shape[2:]) if positions is None else positions
    ties.cost(
        call.shape[0] * positions * math.prod(weight.shape[2:]), rows or weight.shape[0], columns or weight.shape[1]
    )
    ties.mark(rows, Role.NORM if groups > 1 and weight.shape[1] == 1 else Role.PRODUCER)
    return _with_bias(ties, Value(call.shape, {(1,): rows} if rows else {}), bias, 1)


@rule("linear")
def linear(ties: Ties, call: Call) -> Value | list[Value]:
    x, weight, bias = call.args[:3]
    if weight.rank != 2:
        return _keep_whole(ties, call, "linear layer without output axis")
    channels, rows, columns = x.along(-1), weight.along(0), weight.along(1)
    if channels is None:
        ties.keep_axis(x, -1, "linear layer over a block of axes")
    _contract(ties, channels, columns)
    ties.mark(rows, Role.PRODUCER)
    ties.cost(1, *_sizes(x, range(x.rank - 1)), rows or weight.shape[0], columns or weight.shape[1])
    labels = {axes: block.with_zero(False) for axes, block in x.labels.items() if x.rank - 1 not in axes}
    out = Value(call.shape, {**labels, (x.rank - 1,): rows} if rows else labels)
    return _with_bias(ties, out, bias, x.rank - 1)


@rule("addmm")
def addmm(ties: Ties, call: Call) -> Value:
    bias, left, right = call.args[:3]
    return _elementwise(ties, call.shape, [bias, _matmul(ties, call.shape, left, right)], zero="all")


@rule("matmul", "mm", "bmm")
def matmul(ties: Ties, call: Call) -> Value | list[Value]:
    left, right = call.args[:2]
    if min(left.rank, right.rank) < 2:
        return _keep_whole(ties, call, "product with a vector")
    return _matmul(ties, call.shape, left, right)


@rule("baddbmm")
def baddbmm(ties: Ties, call: Call) -> Value:
    bias, left, right = call.args[:3]
    return _elementwise(ties, call.shape, [bias, _matmul(ties, call.shape, left, right)], zero="all")


def _matmul(ties: Ties, shape: tuple[int, ...], left: Value, right: Value) -> Value:
    """(…, m, k) @ (…, k, n): k is contracted; the rest broadcasts like an element-wise product."""
    inner_left, inner_right = left.along(-1), right.along(-2)
    if inner_left and inner_right:
        ties.tie(inner_left, inner_right)
        # The columns of a weight do not die with what they read, so only activations count as zero.
        dies = (inner_left.zero & (not left.constant)) | (inner_right.zero & (not right.constant))
        ties.consume(inner_left.with_zero(dies))
        for value, labels in ((left, inner_left), (right, inner_right)):
            if value.constant:
                ties.mark(labels, Role.CONSUMER)
        if right.constant:
            ties.mark(right.along(-1), Role.PRODUCER)
        if left.constant:
            ties.mark(left.along(-2), Role.PRODUCER)
    else:
        for value, axis in ((left, left.rank - 1), (right, right.rank - 2)):
            ties.fix_axis(value, axis, "contracted with a fixed axis")
    outer = _elementwise(ties, shape, [_summed(left, left.rank - 1), _summed(right, right.rank - 2)], zero="any")
    ties.cost(1, *_sizes(outer, range(outer.rank)), *_sizes(left, [left.rank - 1]))
    return outer


@rule("einsum")
def einsum(ties: Ties, call: Call) -> Value | list[Value]:
    equation, operands = call.args[:2]
    if "." in equation or "->" not in equation:
        return _keep_whole(ties, call, "einsum with implicit axes")
    inputs, output = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    units: dict[str, Labels] = {}  # letter -> labels along it, (size,)
    blocks: dict[str, tuple[str, Labels]] = {}  # letter of the units -> the output's letters of their block, its labels
    sizes: dict[str, int] = {}
    for term, value in zip(terms, operands, strict=True):
        sizes.update(zip(term, value.shape, strict=True))
        for axes, labels in value.labels.items():
            letter, block = term[axes[labels.unit_axis]], "".join(term[axis] for axis in axes)
            if len(set(term)) < len(term):
                ties.keep(labels, "einsum over a diagonal")
                continue
            for k in reversed(range(len(block))):
                if block[k] not in output and k != labels.unit_axis:  # a sum within units
                    labels, block = labels.reduced(k), block[:k] + block[k + 1 :]
            along = labels
            for k in reversed(range(len(block))):
                if k != along.unit_axis:
                    along = along.reduced(k)
            if value.constant and letter not in output:
                ties.mark(labels, Role.CONSUMER)
                along = along.with_zero(False)  # the columns of a weight do not die with what they read
            elif value.constant:
                ties.rely(labels)
            if letter in units:
                ties.tie(units[letter], along)
                units[letter] = units[letter].with_zero(units[letter].zero | along.zero)
            else:
                units[letter] = along
            if len(block) > 1:
                blocks[letter] = (block, labels)
    for letter, labels in units.items():
        if any(
            letter in term and not value.tells_units_along(term.index(letter)) for term, value in zip(terms, operands)
        ):
            ties.keep(labels, "meets an axis of fixed size")
        if letter not in output:
            ties.consume(labels)
    for met in _products(terms, output):
        ties.cost(1, *(units.get(letter, sizes[letter]) for letter in met))
    out: dict[Axes, Labels] = {}
    for letter, labels in units.items():
        if letter in blocks and letter in output:
            block, whole = blocks[letter]
            order = sorted(range(len(block)), key=lambda k: output.index(block[k]))
            axes = tuple(output.index(block[k]) for k in order)
            whole = whole.reordered(order)
            out[axes] = whole.with_zero(labels.spread((axes[whole.unit_axis],), whole, axes).zero)
        elif letter in output:
            out[(output.index(letter),)] = labels
    return Value(call.shape, out)


def _products(terms: Sequence[str], output: str) -> Iterator[str]:
    """The letters of every matrix product of an einsum, which contracts from left to right."""
    left = set(terms[0])
    for i, term in enumerate(terms[1:], 1):
        needed = set(output).union(*terms[i + 1 :])
        right = set(term)
        left, right = left & (needed | right), right & (needed | left)  # letters of one alone are summed before
        if (left & right) - needed:
            yield "".join(sorted(left | right))
        left = (left | right) & needed


@rule("scaled_dot_product_attention")
def attention(ties: Ties, call: Call) -> Value:
    query, key, value = call.args[:3]
    length, width = query.shape[-2] * key.shape[-2], query.shape[-1] + value.shape[-1]
    per_head = [heads for operand in (query, key, value) if (heads := _heads_of(operand)) is not None]
    if len(per_head) < 3 or len({operand.shape[:-2] for operand in (query, key, value)}) > 1:
        ties.keep_all(call.args, "layout of the attention heads")
        ties.cost(math.prod(query.shape[:-2]) * length, width)
        return Value(call.shape)
    ties.keep_all(call.args[3:], "attention mask")
    for operand, heads in zip((query, key, value), per_head):
        ties.tie(per_head[0], heads)
        for axes, labels in operand.labels.items():
            if operand.rank - 3 not in axes:
                ties.keep(labels, "positions attend to one another")
    ties.cost(math.prod(query.shape[:-3]) * length * width, per_head[0])
    axes = value.axes_of(-3)
    assert axes is not None
    return Value(call.shape, {axes: value.labels[axes]})


def _heads_of(operand: Value) -> Ids | None:
    """(heads,) labels of (…, heads, length, dimensions), if its heads can go."""
    axes = operand.axes_of(-3) if operand.rank > 2 else None
    if axes is None or not operand.tells_units_along(-3):
        return None
    labels = operand.labels[axes]
    return np.moveaxis(labels.ids, labels.unit_axis, 0).reshape(operand.shape[-3], -1)[:, 0]


def _summed(value: Value, axis: int) -> Value:
    """With this axis summed to size 1. A sum within units (over head dimensions) leaves their labels on the rest."""
    out = value.collapsed(axis)
    axes = value.axes_of(axis)
    if axes is not None and not value.tells_units_along(axis):
        out.labels[tuple(other for other in axes if other != axis)] = value.labels[axes].reduced(axes.index(axis))
    return out


def _contract(ties: Ties, channels: Labels | None, columns: Labels | None) -> None:
    """Activations meet the columns of a weight."""
    if channels and columns:
        ties.tie(channels, columns)
        ties.consume(channels)
        ties.mark(columns, Role.CONSUMER)
    else:
        _keep_both(ties, channels, columns, "reads a fixed number of channels")


def _keep_both(ties: Ties, left: Labels | None, right: Labels | None, reason: str) -> None:
    ties.keep(left, reason)
    ties.keep(right, reason)


def _with_bias(ties: Ties, out: Value, bias: Value | None, axis: int) -> Value:
    """A row's value is zero only if its bias dies too."""
    rows, labels = out.along(axis), bias.along(0) if bias else None
    ties.mark(labels, Role.BIAS)
    if bias is None or rows is None or labels is None:
        ties.keep(labels, "bias of a fixed number of rows")
        if bias is not None:
            ties.keep(rows, "rows with a bias of fixed size")
        return out
    ties.tie(rows, labels)
    return Value(out.shape, {**out.labels, (axis,): rows.with_zero(rows.zero & labels.zero)})


def _sizes(value: Value, axes: Sequence[int]) -> list[Labels | int]:
    """The sizes of some axes as cost factors: labels where they can shrink, numbers where not."""
    wanted, factors = set(axes), list[Labels | int]()
    for block, labels in value.labels.items():
        if set(block) <= wanted:
            factors.append(labels)
            wanted -= set(block)
    return factors + [value.shape[axis] for axis in sorted(wanted)]


# ------------------------------------------------------------------------------------------- normalisation


@rule("batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_native_batch_norm_legit")
def batch_norm(ties: Ties, call: Call) -> Value | list[Value]:
    x, weight, bias, mean, variance = call.args[:5]
    uses_batch_statistics = call.name == "batch_norm" and bool(call.args[5])
    out = _normalise_channels(ties, call, x, weight, bias, stays_zero=uses_batch_statistics)
    _follow_channels(ties, x, mean, variance)
    return _first_of(call, out)


@rule("instance_norm")
def instance_norm(ties: Ties, call: Call) -> Value:
    x, weight, bias, mean, variance, use_input_statistics = call.args[:6]
    _follow_channels(ties, x, mean, variance)
    return _normalise_channels(ties, call, x, weight, bias, stays_zero=bool(use_input_statistics))


@rule("group_norm")
def group_norm(ties: Ties, call: Call) -> Value:
    x, groups, weight, bias = call.args[:4]
    if groups != x.shape[1]:
        ties.keep_axis(x, 1, "group norm: losing a channel changes its group's statistics")
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
    """A layer norm that goes on counting lost channels: exact as long as they are zero."""
    channels = x.labels[(x.rank - 1,)]
    ties.consume(channels)
    for parameter, role in ((weight, Role.NORM), (bias, Role.BIAS)):
        ties.tie(channels, parameter.labels[(0,)])
        ties.mark(parameter.labels[(0,)], role)
    out = x.without_zeros()
    return replace(out, labels={**out.labels, (x.rank - 1,): channels.with_zero(True)})


def _normalise_channels(
    ties: Ties, call: Call, x: Value, weight: Value | None, bias: Value | None, *, stays_zero: bool
) -> Value:
    """Axis 1 is normalised channel by channel. With weight and bias dead, the output is zero whatever the
    statistics.
    """
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


# -------------------------------------------------------------------------------------------- element-wise

ZERO_STAYS = """
relu relu6 silu gelu hardswish tanh dropout alpha_dropout feature_dropout leaky_relu elu celu selu mish neg abs sqrt
square sign sin tan asin atan sinh asinh erf softshrink hardshrink floor ceil round trunc expm1 log1p clone
contiguous to _to_copy alias detach lift_fresh_copy lift_fresh type_as positive requires_grad nan_to_num rrelu
rrelu_with_noise
""".split()
ZERO_CHANGES = """
sigmoid hardsigmoid exp softplus log_sigmoid cos cosh logical_not isnan isinf bernoulli erfc isfinite
""".split()


@rule(*ZERO_STAYS)
def keeps_zero(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    return Value(x.shape, x.labels)


@rule(*ZERO_CHANGES)
def loses_zero(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    return x.without_zeros()


@rule("rsqrt", "reciprocal", "log", "log2", "log10")
def blows_up_at_zero(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    _keep_zeros(ties, x, f"{call.name} of values that would become zero")
    return x.without_zeros()


def _keep_zeros(ties: Ties, x: Value, reason: str) -> None:
    for labels in x.labels.values():
        ties.keep(labels.ids[labels.zero], reason)


@rule("clamp", "hardtanh", "clamp_min", "clamp_max")
def clamp(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    low, high = {"clamp_min": (0, None), "clamp_max": (None, 0)}.get(call.name, (0, 1))
    limits = call.args[1:]
    minimum = limits[low] if low is not None and low < len(limits) else None
    maximum = limits[high] if high is not None and high < len(limits) else None
    if isinstance(minimum, Value) or isinstance(maximum, Value):
        return _elementwise(ties, call.shape, [x, *walk_values(limits)], zero="never")
    passes_zero = (minimum is None or minimum <= 0) and (maximum is None or maximum >= 0)
    return Value(x.shape, x.labels) if passes_zero else x.without_zeros()


@rule("pow")
def power(ties: Ties, call: Call) -> Value:
    x, exponent = call.args[:2]
    if isinstance(x, Value) and isinstance(exponent, int | float) and exponent > 0:
        return Value(x.shape, x.labels)
    for base in walk_values(x):
        _keep_zeros(ties, base, "a power of values that would become zero")
    return _elementwise(ties, call.shape, list(walk_values(call.args)), zero="never")


@rule("prelu")
def prelu(ties: Ties, call: Call) -> Value:
    x, slope = call.args[:2]
    channels, slopes = x.along(1) if x.rank > 1 else None, slope.along(0)
    if slope.shape == (1,):
        ties.keep(slopes, "one slope for all channels")
    elif channels and slopes:
        ties.tie(channels, slopes)
        ties.mark(slopes, Role.BUFFER)  # f(0) = 0 whatever the slope: it leaves with the unit, but need not decay
    else:
        _keep_both(ties, channels, slopes, "slopes of a fixed number of channels")
    return Value(x.shape, x.labels)


@rule("add", "sub", "rsub", "maximum", "minimum", "where", "copy")
def needs_all_zero(ties: Ties, call: Call) -> Value:
    operands = call.args[1:3] if call.name == "where" else call.args[:2]
    shifts = any(isinstance(operand, int | float) and operand != 0 for operand in operands)
    zero = "never" if shifts else "all"
    return _elementwise(ties, call.shape, list(walk_values(call.args)), zero=zero, judged=list(walk_values(operands)))


@rule("mul")
def multiply(ties: Ties, call: Call) -> Value:
    return _elementwise(ties, call.shape, list(walk_values(call.args[:2])), zero="any")


@rule("div", "true_divide")
def divide(ties: Ties, call: Call) -> Value:
    numerator, denominator = call.args[:2]
    if not isinstance(numerator, Value) or (isinstance(denominator, Value) and denominator.labels):
        # 0 / 0 is not 0: a channel that dies in the denominator must stay.
        ties.keep_all(denominator, "divides by values that would become zero")
    return _elementwise(
        ties, call.shape, list(walk_values(call.args[:2])), zero="all", judged=list(walk_values(numerator))
    )


@rule("masked_fill")
def masked_fill(ties: Ties, call: Call) -> Value:
    x, mask, value = call.args[:3]
    fills_zero = isinstance(value, int | float) and value == 0
    return _elementwise(ties, call.shape, [x, mask], zero="all" if fills_zero else "never", judged=[x])


@rule("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "__and__", "__or__")
def compare(ties: Ties, call: Call) -> Value:
    return _elementwise(ties, call.shape, list(walk_values(call.args)), zero="never")


def _elementwise(
    ties: Ties, shape: tuple[int, ...], values: Sequence[Value], *, zero: str, judged: Sequence[Value] | None = None
) -> Value:
    """Align operands axis by axis from the right and tie what meets.

    zero: the output is zero where "all" of the judged operands are, where "any" is, or "never".
    """
    judged = values if judged is None else judged
    if not all(value.constant for value in values):
        for value in values:
            for labels in value.labels.values() if value.constant else ():
                ties.rely(labels)
    aligned = _align_blocks([_broadcast(ties, value, shape) for value in values])
    ids: dict[Axes, Labels] = {}
    for value in aligned:
        for axes, labels in value.labels.items():
            if axes in ids:
                ties.tie(ids[axes], labels)
            elif any(set(axes) & set(other) for other in ids):
                ties.keep(labels, "axes are grouped differently in two operands")
                for other in [other for other in ids if set(axes) & set(other)]:
                    ties.keep(ids[other], "axes are grouped differently in two operands")
            else:
                ids[axes] = labels
    for axes, labels in ids.items():
        for value in aligned:
            if any(value.shape[axis] == shape[axis] > 1 and value.axes_of(axis) is None for axis in axes):
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


def _align_blocks(values: list[Value]) -> list[Value]:
    """Labels of an axis that is part of another operand's block (heads against heads · dimensions) become as long."""
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


def _broadcast(ties: Ties, value: Value, shape: tuple[int, ...]) -> Value:
    """The value with leading axes of size 1 added; labels of axes that are stretched are kept."""
    offset = len(shape) - value.rank
    labels: dict[Axes, Labels] = {}
    for axes, block in value.labels.items():
        if any(value.shape[axis] != shape[axis + offset] for axis in axes):
            ties.keep(block, "one channel serves all channels of another tensor")
        else:
            labels[tuple(axis + offset for axis in axes)] = block
    return Value((1,) * offset + value.shape, labels)


# ----------------------------------------------------------------------------------- pooling and reductions

POOLING_AXES = {
    **{f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)},
    **{f"_adaptive_avg_pool{n}d": n for n in (2, 3)},
    **{f"max_pool{n}d_with_indices": n for n in (1, 2, 3)},
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "_upsample_nearest_exact2d": 2,
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "_upsample_bilinear2d_aa": 2,
    "upsample_bicubic2d": 2,
    "_upsample_bicubic2d_aa": 2,
    "upsample_trilinear3d": 3,
    "reflection_pad1d": 1,
    "reflection_pad2d": 2,
    "replication_pad1d": 1,
    "replication_pad2d": 2,
    "grid_sampler": 2,
}


@rule(*POOLING_AXES)
def pool(ties: Ties, call: Call) -> Value | list[Value]:
    x: Value = call.args[0]
    for axis in range(x.rank - POOLING_AXES[call.name], x.rank):
        ties.keep_axis(x, axis, "pooled along this axis")
    ties.keep_all(call.args[1:], "places where another tensor is sampled")
    return _first_of(call, Value(call.shape, x.labels))


@rule("mean", "amax", "amin", "linalg_vector_norm", "var", "std", "prod", "norm", "any", "all")
def reduce(ties: Ties, call: Call) -> Value:
    return _reduce(ties, call, lambda labels: ties.keep(labels, f"{call.name} over this axis"))


@rule("max", "min")
def extreme(ties: Ties, call: Call) -> Value | list[Value]:
    x, other = call.args[0], call.args[1] if len(call.args) > 1 else None
    if isinstance(other, Value):
        return needs_all_zero(ties, call)
    dims = [other] if isinstance(other, int) else list(range(x.rank))
    along = replace(call, args=(x, dims))
    return _first_of(call, _reduce(ties, along, lambda labels: ties.keep(labels, f"{call.name} over this axis")))


@rule("sum")
def reduce_sum(ties: Ties, call: Call) -> Value:
    return _reduce(ties, call, ties.consume)


def _reduce(ties: Ties, call: Call, lose: Callable[[Labels], None]) -> Value:
    x: Value = call.args[0]
    dims = next((arg for arg in call.args[1:] if isinstance(arg, list | tuple)), None)
    if dims is None and call.name in ("prod", "any", "all") and len(call.args) > 1 and isinstance(call.args[1], int):
        dims = [call.args[1]]
    gone = {axis % x.rank for axis in dims} if dims else set(range(x.rank))
    stays = call.name not in ("prod", "all")
    labels: dict[Axes, Labels] = {}
    for axes, block in x.labels.items():
        if set(axes) & gone:
            if axes[block.unit_axis] in gone:
                lose(block)
                continue
            for k in reversed(range(len(axes))):
                if axes[k] in gone:  # within units
                    block = block.reduced(k)
            labels[tuple(axis for axis in axes if axis not in gone)] = block if stays else block.with_zero(False)
        else:
            labels[axes] = block if stays else block.with_zero(False)
    if len(call.shape) == x.rank:
        return Value(call.shape, labels)
    left = [axis for axis in range(x.rank) if axis not in gone]
    return Value(x.shape, labels).renamed(call.shape, {old: new for new, old in enumerate(left)})


# -------------------------------------------------------------------------------------------- shape changes


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")
def reshape(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    segments = _segments(x.shape, call.shape)
    out: dict[Axes, Labels] = {}
    for axes in x.labels:
        touched = [segment for segment in segments if set(segment[0]) & set(axes)]
        before, after = (sorted(axis for segment in touched for axis in segment[i]) for i in (0, 1))
        if any(set(other) & set(before) for other in x.labels if other != axes):
            ties.keep(x.labels[axes], "a view merges two sets of channels")
        else:
            out.update(_reshape_block(ties, x, axes, before, call, after))
    return Value(call.shape, out)


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
        makes_heads = shape[moved[-1]] in call.head_dims
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
    value = _broadcast(ties, call.args[0], call.shape)
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
    value = _broadcast(ties, x, call.shape)
    followed = {
        axes: labels.with_zero(False)
        for axes, labels in other.labels.items()
        if all(value.shape[axis] == 1 and value.axes_of(axis) is None for axis in axes)
    }
    return Value(call.shape, {**value.labels, **followed})


@rule("cat", "concat", "concatenate")
def concatenate(ties: Ties, call: Call) -> Value:
    axis = (call.args[1] if len(call.args) > 1 else 0) % len(call.shape)
    parts = [part for part in call.args[0] if part.shape != (0,)]  # torch lets such a one be concatenated to anything
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
    out = _elementwise(ties, rest, [part.collapsed(axis) for part in parts], zero="all").labels
    if labelled:
        out[(axis,)] = Labels(np.concatenate(ids), np.concatenate(zero))
    return Value(call.shape, out)


@rule("hstack")
def concatenate_columns(ties: Ties, call: Call) -> Value | list[Value]:
    return concatenate(ties, replace(call, args=(call.args[0], min(1, len(call.shape) - 1))))


@rule("stack")
def stack(ties: Ties, call: Call) -> Value:
    parts, axis = call.args[0], (call.args[1] if len(call.args) > 1 else 0) % len(call.shape)
    merged = _elementwise(ties, parts[0].shape, parts, zero="all")
    return merged.renamed(call.shape, {old: old + (old >= axis) for old in range(merged.rank)})


@rule("chunk", "split", "split_with_sizes", "tensor_split")
def split(ties: Ties, call: Call) -> list[Value]:
    x: Value = call.args[0]
    axis = (call.args[2] if len(call.args) > 2 else 0) % x.rank
    sizes = [shape[axis] for shape in call.shapes]
    labels = x.along(axis)
    if labels is None:
        ties.keep_axis(x, axis, "a block of axes is split")
    elif (ties.layer, tuple(sizes)) in ties.lists and call.name.startswith("split"):
        ties.numbers.append(Number(ties.layer, tuple(np.split(labels.ids, np.cumsum(sizes)[:-1]))))
    elif len(set(sizes)) > 1:
        ties.keep(labels, "split into unequal parts")
    else:
        parts = labels.ids.reshape(len(sizes), -1)
        ties.tie(parts[:1], parts)  # the parts must stay equal
        if call.name == "split":
            ties.numbers += [Number(ties.layer, (parts[0],)), Number(ties.layer, (labels.ids,))]
    rest = {axes: block for axes, block in x.labels.items() if axis not in axes}
    outputs, start = [], 0
    for shape, size in zip(call.shapes, sizes):
        own = dict(rest)
        if labels:
            own[(axis,)] = Labels(labels.ids[start : start + size], labels.zero[start : start + size])
        outputs.append(Value(shape, own))
        start += size
    return outputs


@rule("glu")
def gated_linear_unit(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    halves = replace(call, name="chunk", args=(x, 2, call.args[1]), shapes=(call.shape, call.shape))
    values, gates = walk_values(split(ties, halves))
    return _elementwise(ties, call.shape, [values, gates.without_zeros()], zero="any")


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
    ties.keep_axis(x, axis, "sliced by numbers")
    return Value(call.shape, {axes: labels for axes, labels in x.labels.items() if axis not in axes})


@rule("roll", "flip")
def moves_positions(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    for axis in call.args[-1] or range(x.rank):
        ties.keep_axis(x, axis, f"{call.name} along this axis")
    return Value(x.shape, x.labels)


@rule("pad", "constant_pad_nd")
def pad(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    value = call.args[3] if call.name == "pad" and len(call.args) > 3 else call.args[2] if len(call.args) > 2 else 0
    constant = call.name != "pad" or call.args[2] == "constant"
    padded = {x.rank - 1 - i // 2 for i, amount in enumerate(call.args[1]) if amount}
    labels: dict[Axes, Labels] = {}
    for axes, block in x.labels.items():
        if set(axes) & padded:
            ties.keep(block, "its axis is padded")
        else:
            # The padded border of a dead channel is not zero, and removing the channel removes the border.
            labels[axes] = block.with_zero(False) if constant and value else block
    return Value(call.shape, labels)


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


# ------------------------------------------------------------------------------------- indexing and making


@rule("embedding")
def embedding(ties: Ties, call: Call) -> Value:
    weight, indices = call.args[:2]
    ties.keep_axis(weight, 0, "rows are looked up by number")
    ties.keep_all(indices, "used as an index")
    columns = weight.along(1)
    return Value(call.shape, {(len(call.shape) - 1,): columns} if columns else {})


@rule("index")
def index(ties: Ties, call: Call) -> Value:
    x, indices = call.args[:2]
    ties.keep_all([i for i in indices if i is not None], "used as an index")
    indexed = [axis for axis, i in enumerate(indices) if i is not None]
    for axis in indexed:
        ties.keep_axis(x, axis, "indexed by numbers")
    rest = {axes: labels for axes, labels in x.labels.items() if not set(axes) & set(indexed)}
    if len(indexed) == 1:
        extra = indices[indexed[0]].rank - 1
        return Value(x.shape, rest).renamed(call.shape, {a: a + extra * (a > indexed[0]) for a in range(x.rank)})
    ties.keep_all(Value(x.shape, rest), "indexed by several tensors")
    return Value(call.shape)


@rule("index_select")
def index_select(ties: Ties, call: Call) -> Value:
    x, axis, indices = call.args[:3]
    ties.keep_all(indices, "used as an index")
    ties.keep_axis(x, axis, "indexed by numbers")
    return Value(call.shape, {axes: labels for axes, labels in x.labels.items() if axis % x.rank not in axes})


MAKERS = """
zeros ones full empty arange linspace eye rand randn scalar_tensor rand_like randn_like new_zeros new_ones new_full
new_empty tril triu tril_indices triu_indices meshgrid sym_size sym_numel argmax argmin
""".split()


@rule(*MAKERS)
def makes_fixed(ties: Ties, call: Call) -> Value | list[Value]:
    if call.name in ("argmax", "argmin", "tril", "triu", "meshgrid"):
        ties.keep_all(call.args, f"{call.name} over this axis")
    fixed = [Value(shape) for shape in call.shapes]
    return fixed if len(fixed) != 1 else fixed[0]


@rule("zeros_like", "ones_like", "full_like", "empty_like")
def makes_alike(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    return Value(x.shape, {axes: labels.with_zero(call.name == "zeros_like") for axes, labels in x.labels.items()})


def _first_of(call: Call, value: Value) -> Value | list[Value]:
    """For operators with extra outputs (indices, saved statistics) that carry no labels."""
    if len(call.shapes) == 1:
        return value
    return [value, *(Value(shape) for shape in call.shapes[1:])]

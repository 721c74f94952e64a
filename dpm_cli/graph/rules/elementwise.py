"""Operators that work entry by entry: what stays zero where the input is zero, and what does not."""

from dpm_cli.graph.labels import Role, Ties, Value, walk_values
from dpm_cli.graph.rules.broadcasting import combine
from dpm_cli.graph.rules.registry import Call, rule
from dpm_cli.graph.rules.weights import keep_both

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
    """Keep whatever would become zero."""
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
        return combine(ties, call.shape, [x, *walk_values(limits)], zero="never")
    passes_zero = (minimum is None or minimum <= 0) and (maximum is None or maximum >= 0)
    return Value(x.shape, x.labels) if passes_zero else x.without_zeros()


@rule("pow")
def power(ties: Ties, call: Call) -> Value:
    x, exponent = call.args[:2]
    if isinstance(x, Value) and isinstance(exponent, int | float) and exponent > 0:
        return Value(x.shape, x.labels)
    for base in walk_values(x):
        _keep_zeros(ties, base, "a power of values that would become zero")
    return combine(ties, call.shape, list(walk_values(call.args)), zero="never")


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
        keep_both(ties, channels, slopes, "slopes of a fixed number of channels")
    return Value(x.shape, x.labels)


@rule("add", "sub", "rsub", "maximum", "minimum", "where", "copy")
def needs_all_zero(ties: Ties, call: Call) -> Value:
    operands = call.args[1:3] if call.name == "where" else call.args[:2]
    added = [value for value in walk_values(call.args[:2]) if not value.constant]
    if call.name == "add" and len(added) == 2:
        ties.mark_residual(added[0])
    shifts = any(isinstance(operand, int | float) and operand != 0 for operand in operands)
    zero = "never" if shifts else "all"
    return combine(ties, call.shape, list(walk_values(call.args)), zero=zero, judged=list(walk_values(operands)))


@rule("mul")
def multiply(ties: Ties, call: Call) -> Value:
    return combine(ties, call.shape, list(walk_values(call.args[:2])), zero="any")


@rule("addcmul")
def add_product(ties: Ties, call: Call) -> Value:
    x, left, right = call.args[:3]
    product = combine(ties, call.shape, [left, right], zero="any")
    return combine(ties, call.shape, [x, product], zero="all")


@rule("lerp")
def interpolate(ties: Ties, call: Call) -> Value:
    return combine(ties, call.shape, list(walk_values(call.args)), zero="all", judged=list(walk_values(call.args[:2])))


@rule("div", "true_divide")
def divide(ties: Ties, call: Call) -> Value:
    numerator, denominator = call.args[:2]
    if not isinstance(numerator, Value) or (isinstance(denominator, Value) and denominator.labels):
        # 0 / 0 is not 0: a channel that dies in the denominator must stay.
        for value in walk_values(denominator):
            _keep_zeros(ties, value, "divides by values that would become zero")
    return combine(ties, call.shape, list(walk_values(call.args[:2])), zero="all", judged=list(walk_values(numerator)))


@rule("masked_fill")
def masked_fill(ties: Ties, call: Call) -> Value:
    x, mask, value = call.args[:3]
    fills_zero = isinstance(value, int | float) and value == 0
    return combine(ties, call.shape, [x, mask], zero="all" if fills_zero else "never", judged=[x])


@rule("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "__and__", "__or__")
def compare(ties: Ties, call: Call) -> Value:
    return combine(ties, call.shape, list(walk_values(call.args)), zero="never")

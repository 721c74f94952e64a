"""Tie activations to the weight and the bias of the layer that they meet."""

from dpm_cli.graph.labels import Labels, Role, Ties, Value


def contract(ties: Ties, channels: Labels | None, columns: Labels | None) -> None:
    """Tie activations to the columns of the weight that reads them."""
    if channels and columns:
        ties.read(channels, columns)
    else:
        keep_both(ties, channels, columns, "reads a fixed number of channels")


def keep_both(ties: Ties, left: Labels | None, right: Labels | None, reason: str) -> None:
    """Keep the labels on both sides of an operator."""
    ties.keep(left, reason)
    ties.keep(right, reason)


def with_bias(ties: Ties, out: Value, bias: Value | None, axis: int) -> Value:
    """Tie rows to their biases: a row's value is zero only if its bias dies too."""
    rows, labels = out.along(axis), bias.along(0) if bias else None
    ties.mark(labels, Role.BIAS)
    if bias is None or rows is None or labels is None:
        ties.keep(labels, "bias of a fixed number of rows")
        if bias is not None:
            ties.keep(rows, "rows with a bias of fixed size")
        return out
    ties.tie(rows, labels)
    return Value(out.shape, {**out.labels, (axis,): rows.with_zero(rows.zero & labels.zero)})

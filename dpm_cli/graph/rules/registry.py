"""One rule per operator: which labels it ties, which its output carries, which it keeps, and what it costs.

An operator without a rule keeps whatever it touches, so a missing rule costs prunable units, never correctness.

Soundness rests on two facts that every rule maintains. An axis without labels has a fixed size, so a label that meets
one is kept. And `Labels.zero` says whether a value is exactly zero once its unit is dead; a contraction over values
that are not (after a sigmoid, say) keeps them, because removing them would change the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpm_cli.graph.labels import Ties, Value, walk_values


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
    """Register a function as the rule of these operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def apply_rule(ties: Ties, call: Call) -> Value | list[Value]:
    """Label the outputs of an operator. Unknown operators keep every label that they touch."""
    known = RULES.get(call.name)
    if known is None:
        return keep_whole(ties, call, f"operator {call.name} {NO_RULE}")
    first_cost = len(ties.costs)
    try:
        out = known(ties, call)
        assert all(_fits(value, shape) for value, shape in zip(walk_values(out), call.shapes))
        return out
    except Exception:  # arguments that the rule never saw; the ties that it has made can only keep more
        del ties.costs[first_cost:]
        return keep_whole(ties, call, f"operator {call.name} as it is used here {NO_RULE}")


def keep_whole(ties: Ties, call: Call, reason: str) -> Value | list[Value]:
    """Keep everything that this call touches."""
    ties.keep_all(call.args, reason)
    ties.cost(_macs_of(call))
    return [Value(shape) for shape in call.shapes] if len(call.shapes) > 1 else Value(call.shape)


def _fits(value: Value, shape: tuple[int, ...]) -> bool:
    """Tell whether a value has this shape, and labels as many as its axes are long."""
    return value.shape == shape and all(
        labels.ids.shape == tuple(shape[axis] for axis in axes) for axes, labels in value.labels.items()
    )


def _macs_of(call: Call) -> int:
    """Count what an operator costs; 0 if it cannot be run alone."""
    try:
        return call.macs()
    except Exception:  # blocks of code, operators of other libraries
        return 0


def first_of(call: Call, value: Value) -> Value | list[Value]:
    """Add the extra outputs of an operator (indices, saved statistics), which carry no labels."""
    if len(call.shapes) == 1:
        return value
    return [value, *(Value(shape) for shape in call.shapes[1:])]

"""Pooling, and reductions over whole axes."""

from collections.abc import Callable
from dataclasses import replace

from dpm_cli.graph.labels import Axes, Labels, Role, Ties, Value
from dpm_cli.graph.rules.elementwise import needs_all_zero
from dpm_cli.graph.rules.registry import Call, first_of, rule

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
    first = x.rank - POOLING_AXES[call.name]
    for axis in range(first, x.rank):
        ties.keep_axis(x, axis, "pooled along this axis")
    ties.keep_all(call.args[1:], "places where another tensor is sampled")
    return first_of(call, Value(call.shape, {axes: block for axes, block in x.labels.items() if max(axes) < first}))


@rule("mean", "amax", "amin", "var", "std", "prod", "any", "all")
def reduce(ties: Ties, call: Call) -> Value:
    return _reduce_kept(ties, call)


@rule("var_mean", "std_mean")
def reduce_twice(ties: Ties, call: Call) -> list[Value]:
    return [_reduce_kept(ties, call)] * 2


@rule("max", "min")
def extreme(ties: Ties, call: Call) -> Value | list[Value]:
    x, other = call.args[0], call.args[1] if len(call.args) > 1 else None
    if isinstance(other, Value):
        return needs_all_zero(ties, call)
    dims = [other] if isinstance(other, int) else list(range(x.rank))
    along = replace(call, args=(x, dims))
    return first_of(call, _reduce_kept(ties, along))


@rule("sum")
def reduce_sum(ties: Ties, call: Call) -> Value:
    return _reduce(ties, call, lambda labels: _count_zeros(ties, call, labels))


@rule("linalg_vector_norm", "norm")
def reduce_norm(ties: Ties, call: Call) -> Value | list[Value]:
    order = call.args[1] if call.args[1] is not None else 2
    if isinstance(order, int | float) and order > 0:
        return _reduce(ties, call, lambda labels: _count_zeros(ties, call, labels))
    return reduce(ties, call)


def _count_zeros(ties: Ties, call: Call, labels: Labels) -> None:
    """Let units go that add nothing to a sum. Of weights, these are those that shrink with their unit."""
    ties.consume(labels)
    if call.args[0].constant:
        ties.mark(labels, Role.READER)


def _reduce_kept(ties: Ties, call: Call) -> Value:
    return _reduce(ties, call, lambda labels: ties.keep(labels, f"{call.name} over this axis"))


def _reduce(ties: Ties, call: Call, lose: Callable[[Labels], None]) -> Value:
    """Reduce over some axes; `lose` is called for labels whose units the result no longer tells apart."""
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

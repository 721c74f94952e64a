"""Lookups by index, and tensors that the code makes."""

from dpm_cli.graph.labels import Ties, Value
from dpm_cli.graph.rules.registry import Call, rule


@rule("embedding")
def embedding(ties: Ties, call: Call) -> Value:
    weight, indices = call.args[:2]
    ties.keep_axis(weight, 0, "rows are looked up by number")
    ties.keep_all(indices, "used as an index")
    columns = weight.along(1)
    return Value(call.shape, {(len(call.shape) - 1,): columns} if columns else {})


@rule("index")
def index(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    indices = call.args[1]
    ties.keep_all([i for i in indices if i is not None], "used as an index")
    indexed = [axis for axis, i in enumerate(indices) if i is not None]
    for axis in indexed:
        ties.fix_axis(x, axis, "indexed by numbers")
    rest = {axes: labels for axes, labels in x.labels.items() if not set(axes) & set(indexed)}
    if len(indexed) == 1 and indices[indexed[0]].rank == 1:
        return x.resized(indexed[0], call.shape[indexed[0]])
    if len(indexed) == 1:
        ties.keep_axis(x, indexed[0], "indexed by numbers")
        extra = indices[indexed[0]].rank - 1
        return Value(x.shape, rest).renamed(call.shape, {a: a + extra * (a > indexed[0]) for a in range(x.rank)})
    ties.keep_all(x, "indexed by several tensors")
    return Value(call.shape)


@rule("index_select")
def index_select(ties: Ties, call: Call) -> Value:
    x: Value = call.args[0]
    axis, indices = call.args[1:3]
    ties.keep_all(indices, "used as an index")
    ties.fix_axis(x, axis, "indexed by numbers")
    return x.resized(axis, call.shape[axis])


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

"""nn.Module -> exported graph -> labels. The only place that knows torch.export and ATen names."""

import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils.flop_counter import FlopCounterMode

from dpm_cli.errors import UnsupportedModelError
from dpm_cli.graph.labels import Axes, Labels, Ties, Value, walk_values
from dpm_cli.graph.rules import NO_RULE, Call, apply_rule
from dpm_cli.layers.modes import in_mode

PRODUCTS = frozenset("scaled_dot_product_attention matmul bmm baddbmm".split())
RESHAPES = frozenset("view reshape unflatten _unsafe_view".split())
HEAD_LAYOUT = RESHAPES | frozenset(
    "permute transpose select unbind getitem contiguous clone mul div squeeze unsqueeze expand alias "
    "layer_norm rms_norm chunk split".split()
)

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]

RETURNS_ITS_INPUT = frozenset(("dropout", "feature_dropout", "alpha_dropout"))  # in eval mode; not in their schemas
MATRIX_LAYERS = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear".split())
INLINED = frozenset(("wrap_with_set_grad_enabled", "wrap_with_autocast"))  # blocks of code under a context manager


def split_example(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One tensor, several (a tuple), or inputs by name (a mapping) -> positional and keyword arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def run_example(model: nn.Module, example: Example) -> Any:
    args, kwargs = split_example(example)
    return model(*args, **kwargs)


def export(model: nn.Module, example: Example, *, training: bool = False) -> ExportedProgram:
    """The flat operator graph of a model. Weights are not copied and nothing is computed.

    Raises UnsupportedModelError with the reason when the model's code cannot be exported.
    """
    args, kwargs = split_example(example)
    try:
        with in_mode(model, training=training), _slow_attention(), _set_momentum(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # torch.export raises dozens of types for what a model's code may do
        reason = _first_line(error)
        raise UnsupportedModelError(
            f"the model cannot be exported to a graph, so it cannot be analysed: {reason}"
        ) from None


def find_layer_calls(model: nn.Module, example: Example) -> Iterator[tuple[str, str | None]]:
    """Every call of a convolution or linear layer with its own weight, and the BatchNorm that alone reads the outputs.

    Raises as `export`.
    """
    program = export(model, example)
    names = _state_names(program, {})
    for node in program.graph.nodes:
        if node.op == "call_function" and _name_of(node) in MATRIX_LAYERS:
            layer = _layer_of(node)
            if names.get(getattr(node.args[1], "name", "")) == f"{layer}.weight":
                yield layer, _batchnorm_behind(node, names)


def _batchnorm_behind(node: torch.fx.Node, names: Mapping[str, str]) -> str | None:
    """If nothing else reads a layer's channels, and the BatchNorm nothing else."""
    channels_last = _name_of(node) == "linear" and node.meta["val"].dim() != 2
    if channels_last or len(node.users) != 1 or _name_of(reader := next(iter(node.users))) != "batch_norm":
        return None
    mean, layer = reader.args[3], _layer_of(reader)
    is_own = (
        isinstance(mean, torch.fx.Node) and len(mean.users) == 1 and names.get(mean.name) == f"{layer}.running_mean"
    )
    return layer if is_own else None


def output_shapes(program: ExportedProgram) -> tuple[tuple[int, ...], ...]:
    """Of every tensor that the model returns, in order."""
    outputs = next(iter(program.graph.find_nodes(op="output"))).args[0]
    assert isinstance(outputs, tuple | list)
    kinds = (spec.kind for spec in program.graph_signature.output_specs)
    nodes = [node for node, kind in zip(outputs, kinds) if kind == OutputKind.USER_OUTPUT]
    values = (node.meta.get("val") for node in nodes if isinstance(node, torch.fx.Node))
    return tuple(tuple(int(size) for size in value.shape) for value in values if isinstance(value, Tensor))


def label(program: ExportedProgram, ties: Ties, parameters: dict[str, Value], aliases: Mapping[str, str]) -> set[str]:
    """Walk the graph once and collect ties, kept labels and costs.

    `parameters` gains a labelled value per parameter and buffer; a second walk of another graph of the same model
    (train mode) shares them. `aliases` maps every name of a shared parameter to one name. Returns the tensors that
    are used.
    """
    state = _state_names(program, aliases)
    signature = program.graph_signature
    buffers = {aliases.get(name, name) for name in signature.inputs_to_buffers.values()}
    constants = set(signature.inputs_to_lifted_tensor_constants)
    inputs: list[Value | None] = []
    used: set[str] = set()
    for node in program.graph.find_nodes(op="placeholder"):
        inputs.append(_placeholder(node, state.get(node.name), buffers, node.name in constants, ties, parameters))
        if node.name in state and node.users:
            used.add(state[node.name])
    outputs = _walk(program.graph_module, inputs, ties)
    for spec, value in zip(signature.output_specs, outputs):
        if spec.kind == OutputKind.USER_OUTPUT:
            ties.keep_all(value, "output of the model")
    return used


def _walk(module: torch.fx.GraphModule, inputs: Sequence[Any], ties: Ties) -> list[Any]:
    """Collect from every operator of a graph with these input values. Returns the values of its outputs."""
    values: dict[torch.fx.Node, Any] = {}
    position = {node: i for i, node in enumerate(module.graph.nodes)}
    head_dims = _find_head_dims(module.graph)
    left = iter(inputs)
    for node in module.graph.nodes:
        match node.op:
            case "placeholder":
                values[node] = next(left)
            case "get_attr":
                body = getattr(module, str(node.target), None)
                values[node] = body if isinstance(body, torch.fx.GraphModule) else _unlabelled(node)
            case "call_function":
                ties.layer = _layer_of(node)
                values[node] = _call(node, ties, values, position, head_dims.get(node, frozenset()))
                ties.layer = ""
            case "output":
                return [values.get(out) if isinstance(out, torch.fx.Node) else out for out in node.args[0]]
    return []


def _state_names(program: ExportedProgram, aliases: Mapping[str, str]) -> dict[str, str]:
    """Placeholder -> parameter or buffer name."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    return {
        spec.arg.name: aliases.get(spec.target, spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds and spec.target is not None and hasattr(spec.arg, "name")
    }


def _placeholder(
    node: torch.fx.Node,
    name: str | None,
    buffers: Set[str],
    constant: bool,
    ties: Ties,
    parameters: dict[str, Value],
) -> Value | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    shape = tuple(int(size) for size in value.shape)
    if name is None:
        return Value(shape, constant=constant)  # an input of the model: every axis has a fixed size
    if name not in parameters:
        labels: dict[Axes, Labels] = {}
        for axis, size in enumerate(shape):
            ids = ties.new_owner(name, axis, size)
            labels[(axis,)] = Labels(ids, np.full(size, name not in buffers))  # buffers are never scaled to zero
        parameters[name] = Value(shape, labels, constant=True)
    return parameters[name]


def _find_head_dims(graph: torch.fx.Graph) -> dict[torch.fx.Node, frozenset[int]]:
    """Views that lead to attention -> the sizes that its two products contract or carry: the head dimensions.

    Walks backwards from every product through operators that only move or scale.
    """
    found: dict[torch.fx.Node, set[int]] = {}
    for product in graph.nodes:
        if product.op != "call_function" or _name_of(product) not in PRODUCTS:
            continue
        for operand in [argument for argument in product.args[:3] if isinstance(argument, torch.fx.Node)]:
            shape = getattr(operand.meta.get("val"), "shape", ())
            sizes = {int(size) for size in shape[-2:]}
            queue, seen = [operand], {operand}
            while queue:
                node = queue.pop()
                if node.op != "call_function" or _name_of(node) not in HEAD_LAYOUT:
                    continue
                if _name_of(node) in RESHAPES:
                    found.setdefault(node, set()).update(sizes)
                fresh = [source for source in node.all_input_nodes if source not in seen]
                seen.update(fresh)
                queue.extend(fresh)
    return {node: frozenset(sizes) for node, sizes in found.items()}


def _name_of(node: torch.fx.Node) -> str:
    return node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else "getitem"


def _call(
    node: torch.fx.Node,
    ties: Ties,
    values: dict[torch.fx.Node, Any],
    position: Mapping[torch.fx.Node, int],
    head_dims: frozenset[int],
) -> Any:
    args: Any = torch.fx.node.map_arg(node.args, lambda n: values[n])
    if node.target is operator.getitem:
        sequence, item = args[0], node.args[1]
        assert isinstance(item, int)
        return sequence[item] if isinstance(sequence, list | tuple) else sequence
    meta = node.meta.get("val")
    shapes = tuple(_static_shape(tensor, node, ties) for tensor in _tensors(meta))
    if not isinstance(node.target, torch._ops.OpOverload):
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: values[n])
        if str(node.target) in INLINED:
            at, body = next((i, arg) for i, arg in enumerate(args) if isinstance(arg, torch.fx.GraphModule))
            return _walk(body, args[at + 1 :], ties)
        ties.keep_all([args, list(kwargs.values())], f"operator {node.target} {NO_RULE}")
        return [Value(shape) for shape in shapes]
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: values[n])
    name = _name_of(node)
    if not shapes:
        if any(walk_values(args)) and not name.startswith("_assert"):
            ties.keep_all(args, f"{name} turns it into a number")
        return None
    in_place = re.fullmatch(r"[^_].*[^_]_", name) is not None
    operands = list(walk_values([args, list(kwargs.values())]))
    constant = all(value.constant for value in operands)
    if not operands and any(shape[:1] == (ties.batch,) for shape in shapes):
        constant = False  # made by the code, one for each input
    if in_place:
        same = _sharing_memory(node)
        if any(position[user] > position[node] for member in same for user in member.users if user.op != "output"):
            # Readers of the result of the write see its labels; these others have labels from before it.
            ties.keep_all(args, "written in place and read through a view")
        for member in same:
            if isinstance(values.get(member), Value):
                values[member] = replace(values[member], constant=values[member].constant and constant)
    first_cost = len(ties.costs)
    arguments = _in_schema_order(node.target, args, kwargs)
    name = name.removesuffix("_") if in_place else name
    out = apply_rule(ties, Call(name, arguments, shapes, partial(_macs_of, node), head_dims))
    if constant:
        ties.cost_without_batch(first_cost)
        out = replace(out, constant=True) if isinstance(out, Value) else [replace(o, constant=True) for o in out]
    return out if isinstance(meta, Tensor) or not isinstance(out, Value) else [out]


def _in_schema_order(
    target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    filled = list(args)
    for argument in target._schema.arguments[len(args) :]:
        filled.append(kwargs.get(argument.name, argument.default_value))
    return tuple(filled)


def _sharing_memory(write: torch.fx.Node) -> set[torch.fx.Node]:
    """What is written in place, what it is a view of, and all views of those."""
    family, waiting = set[torch.fx.Node](), [write.args[0]]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, torch.fx.Node) or node in family or node is write:
            continue
        family.add(node)
        if _may_share_memory(node):
            waiting.append(node.args[0])
        waiting += [user for user in node.users if _may_share_memory(user) and user.args[0] is node]
    return family


def _may_share_memory(node: torch.fx.Node) -> bool:
    """Whether the result may be, or be a view of, the first argument."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.arguments:
        return False
    schema = node.target._schema
    return schema.arguments[0].alias_info is not None or schema.name.split("::")[1] in RETURNS_ITS_INPUT


def _macs_of(node: torch.fx.Node) -> int:
    """Multiply-accumulates of one operator with the sizes it has, for operators that no rule describes."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


def _tensors(meta: Any) -> Iterator[Tensor]:
    if isinstance(meta, Tensor):
        yield meta
    elif isinstance(meta, list | tuple):
        for item in meta:
            yield from _tensors(item)


def _static_shape(tensor: Tensor, node: torch.fx.Node, ties: Ties) -> tuple[int, ...]:
    if all(isinstance(size, int) for size in tensor.shape):
        return tuple(tensor.shape)
    raise UnsupportedModelError(
        f"{ties.layer or 'the model'} uses {node.target}, which gives a tensor whose size depends on the data"
    )


def _unlabelled(node: torch.fx.Node) -> Value | None:
    value = node.meta.get("val")
    return Value(tuple(int(size) for size in value.shape)) if isinstance(value, Tensor) else None


def _layer_of(node: torch.fx.Node) -> str:
    """The dotted name of the module whose forward made this operator."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(stack.values()):
        name = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path).removeprefix("L.self").removeprefix("L").lstrip(".")
        if name:
            return re.sub(r"@\d+$", "", name.removeprefix("_modules.").replace("._modules.", "."))
    return ""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextmanager
def _set_momentum(model: nn.Module) -> Iterator[None]:
    """Norms that average over all batches (no momentum) read a counter in train mode, which cannot be exported."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.momentum is None]
    for norm in norms:
        norm.momentum = 0.1
    try:
        yield
    finally:
        for norm in norms:
            norm.momentum = None


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Fused inference attention would hide the projections from the graph and from every counter."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)

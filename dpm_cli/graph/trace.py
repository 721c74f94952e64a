"""Walk over the operators of an exported graph and collect ties, kept labels and costs."""

import operator
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from dpm_cli.errors import UnsupportedModelError
from dpm_cli.graph.labels import Axes, Labels, Ties, Value, walk_values
from dpm_cli.graph.nodes import find_head_dims, in_schema_order, layer_of, macs_of, name_of, sharing_memory, tensors_in
from dpm_cli.graph.program import state_names
from dpm_cli.graph.rules import NO_RULE, Call, apply_rule

INLINED = frozenset(("wrap_with_set_grad_enabled", "wrap_with_autocast"))  # blocks of code under a context manager


def label(program: ExportedProgram, ties: Ties, parameters: dict[str, Value], aliases: Mapping[str, str]) -> set[str]:
    """Walk the graph once and collect ties, kept labels and costs.

    `parameters` gains a labelled value per parameter and buffer; a second walk of another graph of the same model
    (train mode) shares them. `aliases` maps every name of a shared parameter to one name. Returns the tensors that
    are used.
    """
    state = state_names(program, aliases)
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
    head_dims = find_head_dims(module.graph)
    left = iter(inputs)
    for node in module.graph.nodes:
        match node.op:
            case "placeholder":
                values[node] = next(left)
            case "get_attr":
                body = getattr(module, str(node.target), None)
                values[node] = body if isinstance(body, torch.fx.GraphModule) else _unlabelled(node)
            case "call_function":
                ties.layer = layer_of(node)
                values[node] = _call(node, ties, values, position, head_dims.get(node, frozenset()))
                ties.layer = ""
            case "output":
                return [values.get(out) if isinstance(out, torch.fx.Node) else out for out in node.args[0]]
    return []


def _placeholder(
    node: torch.fx.Node,
    name: str | None,
    buffers: Set[str],
    constant: bool,
    ties: Ties,
    parameters: dict[str, Value],
) -> Value | None:
    """Give an input of the graph its value; a parameter or buffer gets labels along every axis."""
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


def _call(
    node: torch.fx.Node,
    ties: Ties,
    values: dict[torch.fx.Node, Any],
    position: Mapping[torch.fx.Node, int],
    head_dims: frozenset[int],
) -> Any:
    """Apply the rule of one operator to the values of its arguments."""
    args: Any = torch.fx.node.map_arg(node.args, lambda n: values[n])
    if node.target is operator.getitem:
        sequence, item = args[0], node.args[1]
        assert isinstance(item, int)
        return sequence[item] if isinstance(sequence, list | tuple) else sequence
    meta = node.meta.get("val")
    shapes = tuple(_static_shape(tensor, node, ties) for tensor in tensors_in(meta))
    if not isinstance(node.target, torch._ops.OpOverload):
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: values[n])
        if str(node.target) in INLINED:
            at, body = next((i, arg) for i, arg in enumerate(args) if isinstance(arg, torch.fx.GraphModule))
            return _walk(body, args[at + 1 :], ties)
        ties.keep_all([args, list(kwargs.values())], f"operator {node.target} {NO_RULE}")
        return [Value(shape) for shape in shapes]
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: values[n])
    name = name_of(node)
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
        same = sharing_memory(node)
        if any(position[user] > position[node] for member in same for user in member.users if user.op != "output"):
            # Readers of the result of the write see its labels; these others have labels from before it.
            ties.keep_all(args, "written in place and read through a view")
        for member in same:
            if isinstance(values.get(member), Value):
                values[member] = replace(values[member], constant=values[member].constant and constant)
    first_cost = len(ties.costs)
    arguments = in_schema_order(node.target, args, kwargs)
    name = name.removesuffix("_") if in_place else name
    out = apply_rule(ties, Call(name, arguments, shapes, partial(macs_of, node), head_dims))
    if constant:
        ties.cost_without_batch(first_cost)
        out = replace(out, constant=True) if isinstance(out, Value) else [replace(o, constant=True) for o in out]
    return out if isinstance(meta, Tensor) or not isinstance(out, Value) else [out]


def _static_shape(tensor: Tensor, node: torch.fx.Node, ties: Ties) -> tuple[int, ...]:
    """Return a shape of plain integers. Raises UnsupportedModelError if a size depends on the data."""
    if all(isinstance(size, int) for size in tensor.shape):
        return tuple(tensor.shape)
    raise UnsupportedModelError(
        f"{ties.layer or 'the model'} uses {node.target}, which gives a tensor whose size depends on the data"
    )


def _unlabelled(node: torch.fx.Node) -> Value | None:
    """Return the value of a constant in the graph: all its axes have fixed sizes."""
    value = node.meta.get("val")
    return Value(tuple(int(size) for size in value.shape)) if isinstance(value, Tensor) else None

"""nn.Module -> exported graph -> labels. The only place that knows torch.export and ATen names."""

import operator
import re
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from dpm_cli.errors import UnsupportedModelError
from dpm_cli.graph.labels import Axes, Labels, Ties, Value, walk_values
from dpm_cli.graph.rules import Call, apply_rule

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]

VIEWS = frozenset(
    "view reshape select slice permute transpose t unsqueeze squeeze expand chunk split "
    "unbind alias narrow getitem".split()
)


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
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        with _slow_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # torch.export raises dozens of types for what a model's code may do
        reason = _first_line(error)
        raise UnsupportedModelError(
            f"the model cannot be exported to a graph, so it cannot be analysed: {reason}"
        ) from None
    finally:
        for module, mode in modes.items():
            module.training = mode


def label(program: ExportedProgram, ties: Ties, parameters: dict[str, Value], aliases: Mapping[str, str]) -> set[str]:
    """Walk the graph once and collect ties, kept labels and costs.

    `parameters` gains a labelled value per parameter and buffer; a second walk of another graph of the same model
    (train mode) shares them. `aliases` maps every name of a shared parameter to one name. Returns the tensors that
    are used.
    """
    state = _state_names(program, aliases)
    buffers = {aliases.get(name, name) for name in program.graph_signature.inputs_to_buffers.values()}
    values: dict[torch.fx.Node, Any] = {}
    used: set[str] = set()
    for node in program.graph.nodes:
        match node.op:
            case "placeholder":
                values[node] = _placeholder(node, state.get(node.name), buffers, ties, parameters)
                if node.name in state and node.users:
                    used.add(state[node.name])
            case "get_attr":
                values[node] = _unlabelled(node)
            case "call_function":
                ties.layer = _layer_of(node)
                values[node] = _call(node, ties, values)
                ties.layer = ""
            case "output":
                for spec, argument in zip(program.graph_signature.output_specs, node.args[0]):
                    if spec.kind == OutputKind.USER_OUTPUT and isinstance(argument, torch.fx.Node):
                        ties.keep_all(values[argument], "output of the model")
    return used


def _state_names(program: ExportedProgram, aliases: Mapping[str, str]) -> dict[str, str]:
    """Placeholder -> parameter or buffer name."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    return {
        spec.arg.name: aliases.get(spec.target, spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds and spec.target is not None and hasattr(spec.arg, "name")
    }


def _placeholder(
    node: torch.fx.Node, name: str | None, buffers: Set[str], ties: Ties, parameters: dict[str, Value]
) -> Value | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    shape = tuple(int(size) for size in value.shape)
    if name is None:
        return Value(shape)  # an input of the model: every axis has a fixed size
    if name not in parameters:
        labels: dict[Axes, Labels] = {}
        for axis, size in enumerate(shape):
            ids = ties.new_owner(name, axis, size)
            labels[(axis,)] = Labels(ids, ids >= 0)
        parameters[name] = Value(shape, labels, constant=True)
        if name in buffers and not name.endswith(("running_mean", "running_var")):
            ties.keep_all(parameters[name], f"{name}: a buffer of fixed size")
    return parameters[name]


def _call(node: torch.fx.Node, ties: Ties, values: Mapping[torch.fx.Node, Any]) -> Any:
    args = torch.fx.node.map_arg(node.args, lambda n: values[n])
    if node.target is operator.getitem:
        sequence, position = args[0], node.args[1]
        assert isinstance(position, int)
        return sequence[position] if isinstance(sequence, list | tuple) else sequence
    meta = node.meta.get("val")
    shapes = tuple(tuple(int(size) for size in tensor.shape) for tensor in _tensors(meta))
    if not isinstance(node.target, torch._ops.OpOverload):
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: values[n])
        ties.keep_all([args, list(kwargs.values())], f"operator {node.target} has no pruning rule")
        return [Value(shape) for shape in shapes]
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: values[n])
    name = node.target._schema.name.split("::")[1]
    if not shapes:
        if any(walk_values(args)) and not name.startswith("_assert"):
            ties.keep_all(args, f"{name} turns it into a number")
        return None
    in_place = re.fullmatch(r"[^_].*[^_]_", name) is not None
    if in_place and _is_view(node.args[0]):
        ties.keep_all(args, "written in place through a view")
    call = Call(name.removesuffix("_") if in_place else name, _in_schema_order(node.target, args, kwargs), shapes)
    out = apply_rule(ties, call)
    constant = all(value.constant for value in walk_values([args, list(kwargs.values())]))
    if isinstance(out, Value):
        out = Value(out.shape, out.labels, constant)
    return out if isinstance(meta, Tensor) or not isinstance(out, Value) else [out]


def _in_schema_order(
    target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    filled = list(args)
    for argument in target._schema.arguments[len(args) :]:
        filled.append(kwargs.get(argument.name, argument.default_value))
    return tuple(filled)


def _is_view(node: Any) -> bool:
    if not isinstance(node, torch.fx.Node) or node.op != "call_function":
        return False
    name = node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else "getitem"
    return name in VIEWS


def _tensors(meta: Any) -> Iterator[Tensor]:
    if isinstance(meta, Tensor):
        yield meta
    elif isinstance(meta, list | tuple):
        for item in meta:
            yield from _tensors(item)


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
def _slow_attention() -> Iterator[None]:
    """Fused inference attention would hide the projections from the graph and from every counter."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)

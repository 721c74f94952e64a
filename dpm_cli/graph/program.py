"""Export a module to a flat graph of operators.

Only this file, `nodes`, `trace` and `rules` know torch.export and ATen names.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from dpm_cli.errors import UnsupportedModelError, one_line
from dpm_cli.graph.nodes import layer_of, name_of
from dpm_cli.layers.counting import counting_form
from dpm_cli.layers.modes import in_mode, plain_attention

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]

MATRIX_LAYERS = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear".split())


def split_example(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn one tensor, a tuple of inputs or a mapping of named inputs into positional and keyword arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def run_example(model: nn.Module, example: Example) -> Any:
    """Call a model with its example inputs."""
    args, kwargs = split_example(example)
    return model(*args, **kwargs)


def export(model: nn.Module, example: Example, *, training: bool = False) -> ExportedProgram:
    """Export a model to its flat operator graph. This copies no weights and computes nothing.

    Raises UnsupportedModelError with the layer and the reason when the model's code cannot be exported.
    """
    try:
        program = _export(model, example, training=training)
        if not _resizes_buffers(program):
            return program
    except Exception:  # torch.export raises dozens of types for what a model's code may do
        pass
    _run_once(model, example)
    try:
        return _export(model, example, training=training)
    except Exception as error:
        layer = layer_that_raised(error, model)
        place = f"{layer}: " if layer else ""
        raise UnsupportedModelError(
            f"the model cannot be exported to a graph, so it cannot be analysed: {place}{_reason_of(error)}"
        ) from None


def _export(model: nn.Module, example: Example, *, training: bool) -> ExportedProgram:
    args, kwargs = split_example(example)
    with ExitStack() as stack:
        for context in (in_mode(model, training=training), plain_attention(), _set_momentum(model), _restored(model)):
            stack.enter_context(context)
        stack.enter_context(counting_form(model))
        stack.enter_context(_silenced())
        return torch.export.export(model, args, kwargs, strict=False)


def _resizes_buffers(program: ExportedProgram) -> bool:
    """Tell whether the model's code gives a buffer another size: what it reads from then on is another graph."""
    writes = [node for node in program.graph.nodes if node.op == "call_function" and name_of(node) == "copy_"]
    return any(
        to.op == "placeholder" and to.meta["val"].shape != source.meta["val"].shape
        for to, source in (node.args[:2] for node in writes)
        if isinstance(to, torch.fx.Node) and isinstance(source, torch.fx.Node)
    )


def _reason_of(error: Exception) -> str:
    """Say in one line why a model cannot be exported."""
    text = one_line(error, root_cause=True)
    if text.startswith("GuardOnDataDependentSymNode"):
        return "its code decides by the values of a tensor (`if`, `int()`, a mask as index), which no graph can hold"
    return text


@contextmanager
def _silenced() -> Iterator[None]:
    """Silence torch.export, which warns about its own internals, and logs and prints whole graphs when it fails."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _run_once(model: nn.Module, example: Example) -> None:
    """Let a model make what it only makes in its first forward: lazy layers, tables that depend on the input's size."""
    with in_mode(model, training=False), torch.no_grad(), suppress(Exception):
        run_example(model, example)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Undo what the model's forward sets on its modules: during an export these would be tensors without data."""
    tables: list[Any] = []
    for module in model.modules():
        caches = [value for value in vars(module).values() if type(value) in (dict, list)]
        tables += [vars(module), module._parameters, module._buffers, module._modules, *caches]
    saved = [table.copy() for table in tables]
    try:
        yield
    finally:
        for table, before in zip(tables, saved):
            if _differs(table, before):
                table.clear()
                table.extend(before) if isinstance(table, list) else table.update(before)


def _differs(table: Any, before: Any) -> bool:
    """Tell whether a list or dict holds other objects than its earlier copy."""
    if len(table) != len(before):
        return True
    if isinstance(table, list):
        return any(now is not then for now, then in zip(table, before))
    return any(table.get(name) is not value for name, value in before.items())


def layer_that_raised(error: BaseException, model: nn.Module) -> str:
    """Name the innermost layer whose forward was running when an error was raised: "blocks.1.attn"."""
    names = {id(module): name for name, module in model.named_modules()}
    while error.__cause__ is not None:
        error = error.__cause__
    place, trace = "", error.__traceback__
    while trace is not None:
        place = names.get(id(trace.tb_frame.f_locals.get("self"))) or place
        trace = trace.tb_next
    return place


def output_shapes(program: ExportedProgram) -> tuple[tuple[int, ...], ...]:
    """Return the shape of every tensor that the model returns, in order."""
    outputs = next(iter(program.graph.find_nodes(op="output"))).args[0]
    assert isinstance(outputs, tuple | list)
    kinds = (spec.kind for spec in program.graph_signature.output_specs)
    nodes = [node for node, kind in zip(outputs, kinds) if kind == OutputKind.USER_OUTPUT]
    values = (node.meta.get("val") for node in nodes if isinstance(node, torch.fx.Node))
    return tuple(tuple(int(size) for size in value.shape) for value in values if isinstance(value, Tensor))


def state_names(program: ExportedProgram, aliases: Mapping[str, str]) -> dict[str, str]:
    """Map placeholders of the graph to names of parameters and buffers."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    return {
        spec.arg.name: aliases.get(spec.target, spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds and spec.target is not None and hasattr(spec.arg, "name")
    }


def find_layer_calls(model: nn.Module, example: Example) -> Iterator[tuple[str, str | None]]:
    """Yield every convolution or linear layer that is called with its own weight, and the BatchNorm behind it.

    The BatchNorm is None unless it alone reads the outputs. Raises what `export` raises.
    """
    program = export(model, example)
    names = state_names(program, {})
    for node in program.graph.nodes:
        if node.op == "call_function" and name_of(node) in MATRIX_LAYERS:
            layer = layer_of(node)
            if names.get(getattr(node.args[1], "name", "")) == f"{layer}.weight":
                yield layer, _batchnorm_behind(node, names)


def _batchnorm_behind(node: torch.fx.Node, names: Mapping[str, str]) -> str | None:
    """Find the BatchNorm that reads a layer's channels and nothing else; None if anything else reads them too."""
    channels_last = name_of(node) == "linear" and node.meta["val"].dim() != 2
    if channels_last or len(node.users) != 1 or name_of(reader := next(iter(node.users))) != "batch_norm":
        return None
    mean, layer = reader.args[3], layer_of(reader)
    is_own = (
        isinstance(mean, torch.fx.Node) and len(mean.users) == 1 and names.get(mean.name) == f"{layer}.running_mean"
    )
    return layer if is_own else None


@contextmanager
def _set_momentum(model: nn.Module) -> Iterator[None]:
    """Temporarily give a momentum to norms without one: they read a counter in train mode, which cannot be exported."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.momentum is None]
    for norm in norms:
        norm.momentum = 0.1
    try:
        yield
    finally:
        for norm in norms:
            norm.momentum = None

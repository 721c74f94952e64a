"""Write and read ONNX: one file with a dynamic batch, without paths or source lines of the writing machine."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dpm_cli.errors import ModelFileError, RunError, UsageError, one_line
from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.noise import quiet
from dpm_cli.export.onnx_cost import count_cost
from dpm_cli.layers.modes import four_axes_attention, plain_attention
from dpm_cli.layers.outputs import output_tensors
from dpm_cli.measure import keeping_denormals

INPUT, OUTPUT = "image", "logits"
LARGEST = 2**31 - 2**24  # bytes that one protobuf message can hold, less some room for the graph


def serialise(
    module: nn.Module, example: Tensor, metadata: Mapping[str, str], *, opset: int, half: bool = False
) -> bytes:
    """Convert a module (eval mode, on the CPU) with an example (B >= 2, C, H, W), and check the result.

    half: convert to half precision between inputs and outputs of float32; this changes the module.
    Raises RunError if the model cannot be converted, UsageError if this opset cannot express it.
    """
    import onnx

    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
    if weights > LARGEST:
        raise RunError(f"the weights take {weights} bytes; one ONNX file holds {LARGEST}: export torchscript instead")
    with torch.no_grad():
        count = len(output_tensors(module(example)))
    if half:
        module = _Half(module)
    with quiet(), torch.no_grad(), plain_attention(), four_axes_attention():
        try:
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                external_data=False,
                verbose=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT, *(f"{OUTPUT}_{index}" for index in range(1, count))],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
            assert program is not None  # it is only None without dynamo
            proto = program.model_proto
        except Exception as error:  # the model itself has run before, so this is the exporter's problem
            raise RunError(f"the model cannot be converted to ONNX: {one_line(error, root_cause=True)}") from error
    reached = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if reached != opset:
        raise UsageError(f"opset is {opset}, which this model cannot be converted to; {reached} can")
    _strip_(proto.graph)
    for function in proto.functions:
        _strip_nodes_(function.node)
    onnx.helper.set_model_props(proto, dict(metadata))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RunError(f"the converted model is not valid ONNX: {one_line(error, root_cause=True)}") from error
    return bytes(proto.SerializeToString())


def describe_(path: Path, metadata: Mapping[str, str]) -> None:
    """Replace the metadata of a file, and strip what a tool left in it."""
    import onnx

    proto = onnx.load(path)
    _strip_(proto.graph)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, dict(metadata))
    path.write_bytes(proto.SerializeToString())


class _Half(nn.Module):
    """Runs a module in half precision, with inputs and outputs of float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.half().eval()

    def forward(self, images: Tensor) -> Any:
        return tree_map_only(Tensor, _float_if_half, self.module(images.half()))


def _float_if_half(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype is torch.float16 else tensor


def read(path: Path, *, threads: int | None = None, provider: str = "CPUExecutionProvider") -> ExportedModel:
    """Open an ONNX file in ONNX Runtime, on the CPU by default, with as many threads as torch has unless told.

    Raises ModelFileError if it is not ONNX, or does not take one batch of images (B, C, H, W) of any size B.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Threads that spin after a call would slow down anything measured beside this session.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    try:
        # The first session of a process switches denormals for the thread that makes it; some failures are printed.
        with keeping_denormals(), quiet():
            session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
            metadata = dict(session.get_modelmeta().custom_metadata_map)
    except Exception as error:  # its exceptions share no base class
        raise ModelFileError(f"{path} is no ONNX file that can be run ({one_line(error, root_cause=True)})") from None
    inputs = session.get_inputs()
    shape = inputs[0].shape if len(inputs) == 1 else None
    if shape is None or len(shape) != 4 or isinstance(shape[0], int) or inputs[0].type != "tensor(float)":
        described = ", ".join(f"{each.name}: {each.type} {each.shape}" for each in inputs)
        raise ModelFileError(
            f"{path} takes ({described}); needed is one float input ['batch', channels, height, width]"
        )
    name = inputs[0].name

    def outputs(images: Tensor) -> list[Tensor]:
        try:
            arrays = session.run(None, {name: images.detach().cpu().contiguous().numpy()})
            return [torch.from_numpy(array) for array in arrays]
        except Exception as error:  # its exceptions share no base class
            raise RunError(
                f"{path} fails on images of shape {tuple(images.shape)}: {one_line(error, root_cause=True)}"
            ) from error

    fixed = (shape[1], shape[2], shape[3]) if all(isinstance(size, int) for size in shape[1:]) else None
    return ExportedModel("onnx", path, metadata, fixed, outputs, partial(count_cost, path))


def _strip_(graph: Any) -> None:
    """Remove the exporter's notes, stack traces with paths of this machine among them, from a GraphProto."""
    for part in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
    _strip_nodes_(graph.node)


def _strip_nodes_(nodes: Iterable[Any]) -> None:
    for node in nodes:
        del node.metadata_props[:]
        node.ClearField("doc_string")
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _strip_(inner)

"""Write a file that deploys: under a temporary name first, which is loaded again, compared, and only then renamed."""

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from dpm_cli.errors import AccuracyError, DpmError, FormatError, RunError, UsageError
from dpm_cli.export import executorch, int8, onnx, openvino, pt2, torchscript
from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.runtimes import require_format
from dpm_cli.export.verify import answers, largest_difference
from dpm_cli.files import write_atomic

Format = Literal["torchscript", "onnx", "onnx-fp16", "onnx-int8", "pt2", "openvino", "executorch"]
# Formats that keep the numbers of the model.
Exact = Literal["torchscript", "onnx", "onnx-fp16", "pt2", "openvino", "executorch"]
TOLERANCE: dict[Exact, float] = {
    "torchscript": 1e-4,
    "onnx": 1e-4,
    "onnx-fp16": 1e-2,
    "pt2": 1e-4,
    "openvino": 1e-4,
    "executorch": 1e-4,
}


@dataclass(frozen=True)
class Exported:
    """A file that was written, and the largest difference from the module: |a - b| / max(1, max|a|)."""

    format: Format
    path: Path
    bytes: int
    max_difference: float
    quantized: int8.Quantized | None = None  # what int8 costs, for the format onnx-int8


def export_model(
    module: nn.Module,
    example: Tensor,
    *,
    format: Exact,
    path: str | Path,
    metadata: Mapping[str, str],
    tolerance: float | None = None,
    opset: int = 18,
) -> Exported:
    """Export a copy of a module, in eval mode and float32 on the CPU; the module itself stays unchanged.

    example: one image (1, C, H, W); the file takes any batch. opset: for ONNX only. tolerance: the largest difference
    allowed; each format has its own default. In "onnx-fp16" weights and arithmetic are half precision, images and
    outputs float32.
    Raises RunError, and leaves nothing behind, if the model does not run; FormatError, which is one, if it cannot be
    exported in this format or the file computes something else.

        export_model(model, torch.zeros(1, 3, 32, 32), format="onnx", path="model.onnx", metadata={})
    """
    require_format(format)
    if example.ndim != 4:
        raise UsageError(f"the example has the shape {tuple(example.shape)}; needed is (1, channels, height, width)")
    path = Path(path)
    portable = portable_copy(module)
    image = example[:1].detach().to("cpu", torch.float32).contiguous()  # (1, C, H, W)
    failure = RunError
    try:
        expected = answers(portable, image)
        failure = FormatError  # another format may do
        content, weights = _serialise(portable, image.repeat(2, 1, 1, 1), format, metadata, opset)
    except RunError as error:
        raise failure(f"{path.name} was not written: {error}") from error
    difference, tolerance = float("nan"), TOLERANCE[format] if tolerance is None else tolerance

    def write(temporary: Path) -> None:
        nonlocal difference
        temporary.write_bytes(content)
        try:
            if weights:
                temporary.with_suffix(".bin").write_bytes(weights)
            difference = largest_difference(expected, _read(temporary, format).outputs)
            if difference > tolerance:
                raise FormatError(
                    f"its outputs differ from the model's by {difference:.1e} of their largest, tolerance is "
                    f"{tolerance:.0e}"
                )
            if weights:  # first, so that there is never a graph without its weights
                os.replace(temporary.with_suffix(".bin"), path.with_suffix(".bin"))
        except DpmError as error:
            problem = str(error).replace(str(temporary), "the file")
            raise FormatError(f"{path.name} was not written: {problem}") from error
        finally:
            if weights:
                temporary.with_suffix(".bin").unlink(missing_ok=True)

    write_atomic(path, write)
    return Exported(format, path, len(content) + len(weights), difference)


def export_int8(
    module: nn.Module,
    example: Tensor,
    *,
    path: str | Path,
    metadata: Mapping[str, str],
    calibration: int8.Calibration,
    opset: int = 18,
) -> Exported:
    """Export a copy of a module as ONNX of 8-bit integers; arguments as for `export_model`.

    The file is loaded again, and its answers to the held-out images are compared with those of the float32 file.
    Raises AccuracyError if they are worse by more than `quantize.max_drop`; otherwise raises as `export_model` does.
    """
    path = Path(path)
    portable = portable_copy(module)
    with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        export_model(portable, example, format="onnx", path=source, metadata=metadata, opset=opset)
        try:
            quantized = int8.quantize(source, target, calibration, int8.name_weights(portable))
            onnx.describe_(target, metadata)
            expected = answers(portable, example[:1].detach().to("cpu", torch.float32).contiguous())
            difference = largest_difference(expected, onnx.read(target).outputs)
        except (AccuracyError, RunError) as error:
            raise type(error)(f"{path.name} was not written: {str(error).replace(str(target), 'the file')}") from error
        content = target.read_bytes()

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomic(path, write)
    return Exported("onnx-int8", path, len(content), difference, quantized)


def portable_copy(module: nn.Module) -> nn.Module:
    """Copy a module to the CPU: float32, contiguous, in eval mode, without gradients. Shared parameters stay shared."""
    kept: dict[int, object] = {}  # deepcopy takes these instead of copying, which saves GPU memory
    for parameter in module.parameters():
        kept[id(parameter)] = nn.Parameter(_portable(parameter), requires_grad=False)
    for buffer in module.buffers():
        kept[id(buffer)] = _portable(buffer)
    return copy.deepcopy(module, kept).eval()


def _portable(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def _serialise(
    module: nn.Module, example: Tensor, format: Exact, metadata: Mapping[str, str], opset: int
) -> tuple[bytes, bytes]:
    """Return the content of the file, and of a second one with the weights, if the format has one."""
    match format:
        case "torchscript":
            return torchscript.serialise(module, example, metadata), b""
        case "onnx":
            return onnx.serialise(module, example, metadata, opset=opset), b""
        case "onnx-fp16":
            return onnx.serialise(module, example, metadata, opset=opset, half=True), b""
        case "pt2":
            return pt2.serialise(module, example, metadata), b""
        case "openvino":
            return openvino.serialise(onnx.serialise(module, example, metadata, opset=opset), metadata)
        case "executorch":
            return executorch.serialise(module, example), b""
        case _:
            assert_never(format)


def _read(path: Path, format: Exact) -> ExportedModel:
    match format:
        case "torchscript":
            return torchscript.read(path)
        case "onnx" | "onnx-fp16":
            return onnx.read(path)
        case "pt2":
            return pt2.read(path)
        case "openvino":
            return openvino.read(path)
        case "executorch":
            return executorch.read(path)
        case _:
            assert_never(format)

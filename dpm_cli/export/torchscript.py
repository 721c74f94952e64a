"""Write and read TorchScript. Only this file uses torch.jit, which is deprecated but still widely deployed."""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_cli.errors import FormatError, ModelFileError, RunError, one_line
from dpm_cli.export.exported import EXTRA, ExportedModel, parse_extra
from dpm_cli.layers.images import Shape
from dpm_cli.layers.modes import plain_attention
from dpm_cli.layers.outputs import output_tensors
from dpm_cli.measure import count_macs, count_parameters


def serialise(module: nn.Module, example: Tensor, metadata: Mapping[str, str]) -> bytes:
    """Trace a module (eval mode, on the CPU) with an example (B, C, H, W).

    Raises RunError if it cannot be traced, FormatError if its code calls functions of its own that cannot be written.
    """
    extra = json.dumps({"metadata": dict(metadata), "shape": list(example.shape[1:])})
    buffer = io.BytesIO()
    with _quiet(), torch.no_grad(), plain_attention():
        try:
            # strict=False lets dicts through; the tracer's own check is left to the comparison of the saved file.
            traced = torch.jit.trace(module, example, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, buffer, _extra_files={EXTRA: extra})
        except Exception as error:  # the model itself has run before, so this is the tracer's problem
            if function := re.search(r"Could not export Python function call '(\w+)'", str(error)):
                raise FormatError(
                    f"TorchScript cannot hold {function[1]}, a torch.autograd.Function of the model's code; ONNX can "
                    "(--set export=[onnx])"
                ) from error
            raise RunError(f"the model cannot be traced: {one_line(error, root_cause=True)}") from error
    return buffer.getvalue()


def is_torchscript(path: Path) -> bool:
    """Tell whether a zip file looks like TorchScript; `torch.save` and `torch.export` write other entries."""
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    return "constants.pkl" in names and any(name.startswith("code/") for name in names)


def read(path: Path) -> ExportedModel:
    """Open a TorchScript archive on the CPU. Raises ModelFileError if it is damaged."""
    extra = {EXTRA: ""}
    try:
        with _quiet():
            loaded = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)  # type: ignore[no-untyped-call]
            loaded.eval()
        metadata, shape = parse_extra(extra[EXTRA])
    except Exception as error:  # a damaged file can upset the reader in any way
        raise ModelFileError(f"{path} is a damaged TorchScript file ({one_line(error, root_cause=True)})") from None

    def outputs(images: Tensor) -> list[Tensor]:
        with _explaining(path, images), torch.no_grad():
            return output_tensors(loaded(images.cpu()))

    def cost(shape: Shape) -> tuple[int | None, int]:
        image = torch.zeros(1, *shape)
        with _explaining(path, image):
            return count_macs(loaded, image), count_parameters(loaded)

    return ExportedModel("torchscript", path, metadata, shape, outputs, cost)


@contextmanager
def _explaining(path: Path, images: Tensor) -> Iterator[None]:
    """Turn what the code in a file raises into one line: it may raise anything, also by its own `raise`."""
    try:
        yield
    except Exception as error:
        # TorchScript puts the reason last, behind its own traceback.
        reason = next(reversed(str(error).strip().splitlines()), type(error).__name__).strip()[:200]
        raise RunError(f"{path} fails on images of shape {tuple(images.shape)}: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings about the deprecation of torch.jit and about tracing."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", message=r".*torch\.jit", category=category)
        # Python values frozen into the trace show up in the comparison, at other batch sizes and other inputs.
        warnings.filterwarnings("ignore", category=torch.jit._trace.TracerWarning)
        yield

"""Open a deployed file, which its content identifies, not its name."""

import zipfile
from collections.abc import Callable
from pathlib import Path

from dpm_cli.errors import ModelFileError
from dpm_cli.export import executorch, onnx, openvino, pt2, torchscript
from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.runtimes import choose_runtime

START = 64  # bytes that tell the kinds of file apart


def open_exported(
    path: str | Path, *, trust: bool = False, runtime: str | None = None, threads: int | None = None
) -> ExportedModel:
    """Open a TorchScript, ONNX, OpenVINO, ExecuTorch or .pt2 file for running on the CPU.

    runtime: where to run it, instead of the usual place for its format. threads: of ONNX Runtime and OpenVINO, which
    keep their own; by default as many as torch has. Raises ModelFileError for any other file, UsageError for a runtime
    that cannot run it or is not installed.

    TorchScript and ONNX neither run Python nor unpickle, but both are programs: they call the operators that they name,
    and TorchScript has some that read and write files. Open what you would run. An archive of torch.export may hold
    pickles, so it is refused without `trust`.

        model = open_exported("out/model.onnx")
        logits = model(torch.zeros(1, *model.shape))  # (1, classes)
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(START)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; give a .ts, .onnx or .pt2 file") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise ModelFileError(f"{path} is empty; export it again")
    if is_openvino(start):
        choose_runtime("openvino", runtime, path)
        return openvino.read(path, threads=threads)
    if is_executorch(start):
        choose_runtime("executorch", runtime, path)
        return executorch.read(path)
    if not start.startswith(b"PK"):
        return _read_onnx(path, runtime, threads)
    choose_runtime("torchscript", runtime, path)
    if _is(torchscript.is_torchscript, path):
        return torchscript.read(path)
    if not _is(pt2.is_torch_export, path):
        raise ModelFileError(f"{path} is an archive, but neither TorchScript nor torch.export; give a .ts or .pt2 file")
    if not trust:
        raise ModelFileError(
            f"{path} is a torch.export archive, which may run code when it is opened: give the .ts or .onnx file, or "
            "--trust if you trust whoever made it"
        )
    return pt2.read(path)


def is_openvino(start: bytes) -> bool:
    return start.lstrip().startswith((b"<?xml", b"<net"))


def is_executorch(start: bytes) -> bool:
    return start[4:6] == b"ET"


def _read_onnx(path: Path, runtime: str | None, threads: int | None) -> ExportedModel:
    match choose_runtime("onnx", runtime, path):
        case "openvino":
            return openvino.read(path, threads=threads)
        case "tensorrt":
            return onnx.read(path, threads=threads, provider="TensorrtExecutionProvider")
        case _:
            return onnx.read(path, threads=threads)


def is_program(path: str | Path) -> bool:
    """Tell whether a file is a program, damaged or not, rather than weights: ONNX alone cannot be told from these."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            if is_openvino(start := file.read(START)) or is_executorch(start):
                return True
        return torchscript.is_torchscript(path) or pt2.is_torch_export(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return False


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    """Ask a question about an archive. Raises ModelFileError if it is damaged."""
    try:
        return kind(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise ModelFileError(f"{path} is a damaged or truncated archive ({error}); export it again") from None

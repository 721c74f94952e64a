"""Open a deployed file, which its content identifies, not its name."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dpm_cli.errors import ModelFileError, one_line
from dpm_cli.export import executorch, onnx, openvino, ours_onnx, pt2, torchscript
from dpm_cli.export.confined import open_confined
from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.ours import find_excess, find_foreign
from dpm_cli.export.runtimes import choose_runtime
from dpm_cli.files import open_regular

T = TypeVar("T")
START = 64  # bytes that tell the kinds of file apart


def open_exported(
    path: str | Path,
    *,
    trust: bool = False,
    runtime: str | None = None,
    threads: int | None = None,
    confined: bool = False,
) -> ExportedModel:
    """Open a TorchScript, ONNX, OpenVINO, ExecuTorch or .pt2 file for running on the CPU.

    runtime: where to run it, instead of the usual place for its format. threads: of ONNX Runtime and OpenVINO, which
    keep their own; by default as many as torch has. Raises ModelFileError for any other file, UsageError for a runtime
    that cannot run it or is not installed.

    Without `trust`, nothing opens that can do more than compute: an archive of torch.export may hold pickles, and
    TorchScript may read and write files and loop, so it must be as this package writes it (`ours`).
    confined: without `trust`, run ONNX that is not as this package writes it in a process of its own, with limits.

        model = open_exported("out/model.onnx")
        logits = model(torch.zeros(1, *model.shape))  # (1, classes)
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
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
        if confined and path.suffix != ".onnx" and is_weights(start):
            raise ModelFileError(f"{path} holds weights, not an exported file; give a .ts, .onnx or .pt2 file")
        choose_runtime("onnx", runtime, path)
        if confined and not trust and ours_onnx.find_foreign(path):
            return open_confined(path, runtime, threads)
        return read_onnx(path, runtime, threads)
    return _open_archive(path, runtime, trust=trust)


def _open_archive(path: Path, runtime: str | None, *, trust: bool) -> ExportedModel:
    """Open TorchScript or torch.export, which hold code. Raises ModelFileError for what needs trust."""
    if not trust and (excess := _ask(find_excess, path)):
        raise ModelFileError(f"{path} is no archive that a model needs: {excess}")
    if _ask(torchscript.is_torchscript, path):
        choose_runtime("torchscript", runtime, path)
        if not trust and (foreign := _ask(find_foreign, path)):
            raise ModelFileError(
                f"{path} is TorchScript that dpm did not write ({foreign}), and could read and write files: give the "
                ".onnx file, or --trust if you trust whoever made it"
            )
        return torchscript.read(path)
    if not _ask(pt2.is_torch_export, path):
        raise ModelFileError(f"{path} is an archive, but neither TorchScript nor torch.export; give a .ts or .pt2 file")
    choose_runtime("pt2", runtime, path)
    if not trust:
        raise ModelFileError(
            f"{path} is a torch.export archive, which may run code when it is opened: give the .ts or .onnx file, or "
            "--trust if you trust whoever made it"
        )
    return pt2.read(path)


def is_openvino(start: bytes) -> bool:
    return start.lstrip().startswith((b"<?xml", b"<net"))


def is_weights(start: bytes) -> bool:
    """Tell whether a file begins as a safetensors file or a pickle does: no process needs to be started for it."""
    return start[8:9] == b"{" or start.startswith(b"\x80")


def is_executorch(start: bytes) -> bool:
    return start[4:6] == b"ET"


def read_onnx(path: Path, runtime: str | None, threads: int | None) -> ExportedModel:
    """Open an ONNX file in this process. Arguments and errors as for `open_exported`."""
    match choose_runtime("onnx", runtime, path):
        case "openvino":
            return openvino.read(path, threads=threads)
        case "tensorrt":
            return onnx.read(path, threads=threads, provider="TensorrtExecutionProvider")
        case _:
            return onnx.read(path, threads=threads)


def is_program(path: str | Path) -> bool:
    """Tell whether a file is a program, damaged or not, rather than weights: ONNX is only known by its name."""
    path = Path(path)
    if path.suffix == ".onnx":
        return True
    try:
        with open_regular(path) as file:
            if is_openvino(start := file.read(START)) or is_executorch(start):
                return True
        return torchscript.is_torchscript(path) or pt2.is_torch_export(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return False


def _ask(question: Callable[[Path], T], path: Path) -> T:
    """Ask a question about an archive. Raises ModelFileError if it is damaged."""
    try:
        return question(path)
    except Exception as error:  # zipfile and zlib raise half a dozen kinds for damaged archives
        raise ModelFileError(f"{path} is a damaged or truncated archive ({one_line(error)}); export it again") from None

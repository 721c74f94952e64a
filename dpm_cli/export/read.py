"""Open a deployed file, which its content identifies, not its name."""

import zipfile
from collections.abc import Callable
from pathlib import Path

from dpm_cli.errors import ModelFileError
from dpm_cli.export import onnx, pt2, torchscript
from dpm_cli.export.exported import ExportedModel


def open_exported(path: str | Path, *, trust: bool = False) -> ExportedModel:
    """Open a TorchScript, ONNX or .pt2 file for running on the CPU. Raises ModelFileError for anything else.

    TorchScript and ONNX neither run Python nor unpickle, but both are programs: they call the operators that they name,
    and TorchScript has some that read and write files. Open what you would run. An archive of torch.export may hold
    pickles, so it is refused without `trust`.

        model = open_exported("out/model.onnx")
        logits = model(torch.zeros(1, *model.shape))  # (1, classes)
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; give a .ts, .onnx or .pt2 file") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise ModelFileError(f"{path} is empty; export it again")
    if not start.startswith(b"PK"):
        return onnx.read(path)
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


def is_program(path: str | Path) -> bool:
    """Tell whether a file is an archive of TorchScript or torch.export, damaged or not, rather than of weights."""
    path = Path(path)
    try:
        return torchscript.is_torchscript(path) or pt2.is_torch_export(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return False


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    """Ask a question about an archive. Raises ModelFileError if it is damaged."""
    try:
        return kind(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise ModelFileError(f"{path} is a damaged or truncated archive ({error}); export it again") from None

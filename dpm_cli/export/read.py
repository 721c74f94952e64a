"""Opens a deployed file by what it contains, whatever its name."""

import zipfile
from pathlib import Path

from dpm_cli.errors import ModelFileError
from dpm_cli.export import onnx, torchscript
from dpm_cli.export.exported import ExportedModel


def open_exported(path: str | Path) -> ExportedModel:
    """Open a TorchScript or ONNX file for running on the CPU. Raises ModelFileError for anything else.

    Neither format runs Python or unpickles, but both are programs: they call the operators that they name, and
    TorchScript has some that read and write files. Open what you would run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; give a .ts or .onnx file") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise ModelFileError(f"{path} is empty; export it again")
    if start.startswith(b"PK"):
        return _open_zip(path)
    return onnx.read(path)


def _open_zip(path: Path) -> ExportedModel:
    try:
        scripted = torchscript.is_torchscript(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise ModelFileError(f"{path} is a damaged or truncated archive ({error}); export it again") from None
    if not scripted:
        raise ModelFileError(f"{path} is an archive, but not TorchScript; give a .ts or .onnx file")
    return torchscript.read(path)

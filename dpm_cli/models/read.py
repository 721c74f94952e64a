"""Read the plain object inside a model file. Nothing in the file is executed unless the user trusts it."""

import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from dpm_cli.errors import ModelFileError, listing, one_line
from dpm_cli.models.recognise import SAFE_WAY, Kind, recognise
from dpm_cli.recipe.code import current_folder_importable

DAMAGED = "is truncated or damaged: copy or download it again"
ALLOWED_IN_LEGACY = ("collections.OrderedDict", "torch._utils.", "torch.nn.parameter.Parameter", "torch.Size")


def read_model_file(path: Path, *, trust: bool = False) -> Any:
    """Read what the file holds: usually a dict of tensors, on the CPU. The tensors may be views of the file.

    With `trust` the pickle inside may run any code. Raises ModelFileError.
    """
    kind = recognise(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind == "torch":
        _require_sound_archive(path)
    if trust:
        return _unpickle(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # about tensors of kinds that are refused later anyway
            # mmap: a record is never read into more memory than the file has
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch")
    except Exception:  # a damaged pickle stream can raise anything
        wanted = _find_classes(path, kind)
    if not wanted:
        raise ModelFileError(f"{path} {DAMAGED}")
    raise ModelFileError(
        f"{path} is a pickle that wants to run code ({listing(wanted, shown=5)}): {SAFE_WAY} with model.arch in the "
        "recipe; --trust only if you trust whoever made it"
    )


def _require_sound_archive(path: Path) -> None:
    """Refuse compressed archives and wrong CRCs: without compression, nothing declared is larger than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            is_plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not is_plain or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ModelFileError(f"{path} is compressed, as torch.save never does: {SAFE_WAY}")
            is_damaged = archive.testzip() is not None
    except ModelFileError:
        raise
    except Exception:  # zipfile raises half a dozen kinds for a damaged directory
        is_damaged = True
    if is_damaged:
        raise ModelFileError(f"{path} {DAMAGED}")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path, device="cpu")
    except Exception:  # the parser's own error, or torch's for a dtype it does not know
        raise ModelFileError(f"{path} {DAMAGED}") from None
    return tensors


def _unpickle(path: Path) -> Any:
    try:
        with current_folder_importable():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # trusted code may raise anything; usually its classes are not importable here
        raise ModelFileError(
            f"{path} cannot be unpickled ({one_line(error)}): run where its classes can be imported, or {SAFE_WAY}"
        ) from None


def _find_classes(path: Path, kind: Kind) -> list[str]:
    """Find the classes and functions that a pickle names beyond tensors, without running it."""
    try:
        if kind == "torch":
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        return sorted(name for name in _legacy_globals(path) if not _is_allowed_in_legacy(name))
    except Exception:  # the pickle stream is damaged
        return []


def _legacy_globals(path: Path) -> set[str]:
    """Collect the globals of the fourth pickle in the file; a magic number, a version and system facts precede it."""
    names: set[str] = set()
    strings: list[str] = []
    with path.open("rb") as file:
        for _ in range(4):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    names.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return names


def _is_allowed_in_legacy(name: str) -> bool:
    return name.startswith(ALLOWED_IN_LEGACY) or (name.startswith("torch.") and name.endswith("Storage"))

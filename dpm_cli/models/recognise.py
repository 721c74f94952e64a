"""Recognise the kind of a file by its first bytes or its zip directory, without unpickling anything.

Every foreign file is refused in one line that says what it is and what to do.
"""

import codecs
import struct
import zipfile
from pathlib import Path
from typing import Literal

from dpm_cli.errors import ModelFileError

Kind = Literal["torch", "torch-legacy", "safetensors"]

SAFE_WAY = "save the weights where the model was made, torch.save(model.state_dict(), 'weights.pt'), and pass that file"
NOT_WEIGHTS = "not the weights that it was exported from"
HEAD = 4096  # bytes to look at
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: a pickled number comes first

SIGNATURES: tuple[tuple[int, bytes, str], ...] = (  # offset, bytes, what it is
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
    (0, b"BM", "a BMP picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (8, b"WEBP", "a WebP picture"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x89HDF", "an HDF5 file (Keras weights?)"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"GGUF", "a GGUF language model"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x7fELF", "a program"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"BZh", "a bzip2 archive; unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive; unpack it first"),
    (0, b"(\xb5/\xfd", "a zstd archive; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
)


def recognise(path: Path) -> Kind:
    """Return the kind of a file that may hold weights. Raises ModelFileError that says what any other file is."""
    head, size = _read_head(path)
    if head.startswith(b"version https://git-lfs"):
        raise ModelFileError(f"{path} is a git-lfs pointer, not the model itself: run `git lfs pull`")
    if head.startswith(b"PK"):
        return _recognise_zip(path)
    if path.suffix == ".safetensors" or _is_safetensors(head, size):
        return "safetensors"
    if head[:1] == b"\x80" and LEGACY_MAGIC in head[:64]:
        return "torch-legacy"
    raise ModelFileError(f"{path} is {_describe(head, path)}; a model is a state dict (.pt, .safetensors) or a slim.pt")


def _read_head(path: Path) -> tuple[bytes, int]:
    """Read the first bytes and the size of a regular, non-empty file."""
    try:
        if path.is_dir():
            inside = path / "slim.pt"
            raise ModelFileError(
                f"{path} is a folder" + (f": did you mean {inside}?" if inside.is_file() else "; name a file in it")
            )
        if not path.exists():
            raise ModelFileError(f"no model file {str(path)!r}")
        if not path.is_file():
            raise ModelFileError(f"{path} is not a regular file")
        with path.open("rb") as file:
            head, size = file.read(HEAD), path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ModelFileError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not size:
        raise ModelFileError(f"{path} is empty: copy or download it again")
    return head, size


def _recognise_zip(path: Path) -> Literal["torch"]:
    """Accept archives that torch.save wrote. Raises ModelFileError for all others."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except Exception:  # zipfile raises half a dozen kinds for a damaged directory
        raise ModelFileError(f"{path} is truncated or damaged: copy or download it again") from None
    names = {entry.partition("/")[2] for entry in entries}  # without the folder that torch puts around everything
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise ModelFileError(f"{path} is a TorchScript archive, {NOT_WEIGHTS}: {SAFE_WAY}")
    if "archive_format" in names or any(name.startswith(("models/", "serialized_")) for name in names | set(entries)):
        raise ModelFileError(f"{path} is a torch.export archive (.pt2), {NOT_WEIGHTS}: {SAFE_WAY}")
    if "data.pkl" not in names:
        shown = ", ".join(repr(entry[:40]) for entry in entries[:3]) or "nothing"
        raise ModelFileError(f"{path} is a zip archive that torch.save did not write (it holds {shown}): {SAFE_WAY}")
    return "torch"


def _is_safetensors(head: bytes, size: int) -> bool:
    """Tell whether the file starts with eight bytes of header length, then JSON."""
    return len(head) > 8 and head[8:9] == b"{" and 8 + int(struct.unpack("<Q", head[:8])[0]) <= size


def _describe(head: bytes, path: Path) -> str:
    """Say what kind of foreign file this is."""
    for offset, signature, what in SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return what
    if path.suffix == ".onnx" or _is_onnx(head):
        return f"an ONNX model, {NOT_WEIGHTS}"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle that torch.save did not write"
    if _is_text(head):
        is_page = head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html"))
        return "a web page (a download that went wrong?)" if is_page else "a text file"
    return "not a file of any known model format"


def _is_onnx(head: bytes) -> bool:
    """Tell whether this is a ModelProto: field 1 (ir_version) is small, then comes field 2, 3, 4, 7 or 8."""
    return len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 64 and head[2] in (0x12, 0x1A, 0x22, 0x3A, 0x42)


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # incremental: the last character may be cut
    except UnicodeDecodeError:
        return False
    return b"\0" not in head

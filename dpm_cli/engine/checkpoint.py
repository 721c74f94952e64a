"""Write and read checkpoints that survive a kill, a full disk and a flipped bit.

A file holds a header (magic, SHA-256 of what follows) and a `torch.save` of plain values, so the checksum always
belongs to the data. The last two are kept, and at every moment at least one of them is whole.
"""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from dpm_cli.errors import RunError
from dpm_cli.files import MAGIC, open_regular, previous_of, write_atomic

HEADER_BYTES = len(MAGIC) + hashlib.sha256().digest_size


class Checkpoint(NamedTuple):
    """Holds a verified state, and the damaged files that were skipped to find it."""

    state: dict[str, Any]  # nested dicts and lists of tensors, numbers, strings; tensors on the CPU
    path: Path
    damaged: tuple[Path, ...]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state`; the existing checkpoint becomes the previous one (`files.previous_of`).

    Raises RunError or OutputError when the disk is full or not writable; both older files are then untouched.
    """

    def write(temporary: Path) -> None:
        _write_verified(temporary, state)
        # Move the older one only now; if it is damaged, it must not replace the intact one before it.
        if _is_intact(path):
            os.replace(path, previous_of(path))

    write_atomic(path, write)


def load_checkpoint(newest: Path) -> Checkpoint | None:
    """Load the newest intact checkpoint; None if there is no file. Raises RunError if all are damaged."""
    damaged: list[Path] = []
    for path in (newest, previous_of(newest)):
        if path.exists():
            state = read_verified(path)
            if state is not None:
                return Checkpoint(state, path, tuple(damaged))
            damaged.append(path)
    if damaged:
        names = " and ".join(str(path) for path in damaged)
        raise RunError(f"{names} cannot be read or fail their checksum; start again with --overwrite")
    return None


def remove_checkpoints(path: Path) -> None:
    """Remove both checkpoints. Call when the run is finished and its results are written."""
    for old in (previous_of(path), path):
        old.unlink(missing_ok=True)


def capture_rng() -> dict[str, Any]:
    """Return the states of torch's generators, which dropout uses: of the CPU, and of CUDA devices if in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_rng(state: dict[str, Any]) -> None:
    """Restore the states of `capture_rng`; devices that are absent here are skipped."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for index, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(cuda, index)


class _HashingFile:
    """Hashes what is written through it, so that no copy of the state is held in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _write_verified(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        hashing = _HashingFile(file)
        torch.save(state, hashing)  # type: ignore[arg-type]  # sequential writes only
        file.seek(0)
        file.write(MAGIC + hashing.sha256.digest())


def _is_intact(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return _header_matches(file)
    except OSError:
        return False


def _header_matches(file: IO[bytes]) -> bool:
    """Compare the checksum, and leave the file at the start of the data."""
    header = file.read(HEADER_BYTES)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(HEADER_BYTES)
    return header == MAGIC + digest.digest()


def read_verified(path: Path) -> dict[str, Any] | None:
    """Read the state; None if the file is damaged, foreign or unreadable. Executes nothing in it."""
    try:
        with open_regular(path) as file:
            if not _header_matches(file):
                return None
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    return None  # compressed entries, as in a zip bomb; torch never writes them
            file.seek(HEADER_BYTES)
            state = torch.load(file, map_location="cpu", weights_only=True)
        return state if isinstance(state, dict) and not _holds_hostile_tensor(state) else None
    except Exception:  # a foreign file can have a correct checksum and still break the reader in any way
        return None


def _holds_hostile_tensor(value: object) -> bool:
    """Tell whether a tensor claims to be larger than its data, or is not of a plain kind that a run saves."""
    if isinstance(value, torch.Tensor):
        is_plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        return not is_plain or value.numel() * value.element_size() > value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return any(_holds_hostile_tensor(entry) for entry in value.values())
    return isinstance(value, list | tuple) and any(_holds_hostile_tensor(entry) for entry in value)

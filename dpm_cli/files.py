"""Files that are whole or not there, and the folder of a run."""

import contextlib
import errno
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dpm_cli.errors import OutputError, RunError

REPORT = "report.json"  # written last: its presence says that the run is finished
CHECKPOINT = "checkpoint.pt"  # removed when the run is finished
PREVIOUS = "checkpoint.previous.pt"  # the one before it; for a moment, while a new one gets its name, the only one
LOCK = ".dpm-lock"  # while a run writes here
OUTPUTS = (
    "slim.pt",
    "model.ts",
    "model.onnx",
    "model.fp16.onnx",
    "model.pt2",
    REPORT,
    "recipe.yaml",
    "metrics.jsonl",
)


def checkpoint_of(model: Path) -> Path:
    """Where the checkpoint of a model in training lies: model.pt -> model.checkpoint.pt."""
    return model.with_name(f"{model.stem}.checkpoint.pt")


def previous_of(checkpoint: Path) -> Path:
    """Where the checkpoint before the newest one lies: checkpoint.pt -> checkpoint.previous.pt."""
    return checkpoint.with_name(f"{checkpoint.stem}.previous{checkpoint.suffix}")


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it, replacing what was there.

    Whatever fails, `path` is as it was and the temporary file is gone. With `torch.save`, write to an open file, not to
    the name: only then is "disk full" an OSError.
    Raises RunError if the file cannot be written (disk full, not writable).
    """
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")  # writers may look at the suffix
    try:
        write(temporary)
        _flush_to_disk(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save to an open file: closing the archive raises its own error over the file's "disk full"
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise RunError(f"{path} cannot be written: {reason.strerror or reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some systems cannot flush a folder; the rename itself is done
        _flush_to_disk(path.parent, os.O_RDONLY)


def prepare_output(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Create the folder of a run, or check that a run may write into it.

    Results that are there are never overwritten without `overwrite`; an unfinished run goes on with `resume`, which
    starts from the beginning where nothing was saved yet. Raises OutputError.
    """
    if overwrite and resume:
        raise OutputError("--resume continues a run and --overwrite starts it anew: give one of them")
    require_writable(folder)
    remove_leftovers(folder, (*OUTPUTS, CHECKPOINT))
    if overwrite:
        return  # what is there goes when the new run has something in its place
    if is_unfinished(folder):
        if not resume:
            raise OutputError(f"{folder} holds an unfinished run: --resume continues it, --overwrite starts anew")
        return
    if (folder / REPORT).exists():
        raise OutputError(f"{folder} holds a finished run: choose another folder, or --overwrite to replace it")
    present = [name for name in OUTPUTS if (folder / name).exists()]
    if present and not resume:
        raise OutputError(
            f"{folder} already holds {', '.join(present)}: choose another folder, or --overwrite to replace it"
        )


def is_unfinished(folder: Path) -> bool:
    """Whether a run was stopped here and can be resumed."""
    return any((folder / name).exists() for name in (CHECKPOINT, PREVIOUS))


def require_writable(folder: Path) -> None:
    """Create the folder if it is not there. Raises OutputError if it cannot be written."""
    probe = folder / f".dpm-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)  # permissions alone do not tell: read-only disks, root
        probe.unlink()
    except FileExistsError:
        raise OutputError(f"{folder} is a file, not a folder: choose another --output") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"output folder {str(folder)!r} cannot be written: {reason}") from None


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Keep other runs out of a folder, which must exist. Raises OutputError if one is in it.

    The system holds the lock for this process and drops it however the process ends, so that a killed run never blocks
    the next one; the file itself says nothing but who it is. Worker processes do not inherit it.
    """
    path = (folder / name).resolve()
    if path in _held:  # the system does not keep a process out of what it holds itself
        raise _in_use(folder, "this process")
    try:
        descriptor = _lock(path)
    except OSError as error:
        raise OutputError(f"output folder {str(folder)!r} cannot be locked: {error.strerror or error}") from None
    if descriptor is None:
        raise _in_use(folder, _read_holder(path))
    _held.add(path)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        _held.discard(path)
        with contextlib.suppress(OSError):  # the folder may have been removed meanwhile
            path.unlink()
        os.close(descriptor)


_held: set[Path] = set()


def _lock(path: Path) -> int | None:
    """A descriptor of the locked file, or none if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_free = _take(descriptor)
            with contextlib.suppress(FileNotFoundError):
                if is_free and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not is_free:
            return None
        # The file was removed by its last holder between the two lines above: lock the new one.


if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _take(descriptor: int) -> bool:
        # lockf, not flock: a decoding process that outlives a killed run would keep the latter's lock.
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True


def _read_holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")[:100] or "another process"
    return "another process"


def _in_use(folder: Path, holder: str) -> OutputError:
    return OutputError(f"{folder} is in use by {holder}: wait until that run is over, or choose another --output")


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove temporary files that a killed process left while it wrote one of these files."""
    paths = [Path(name) for name in names]
    ours = re.compile("|".join(rf"\.{re.escape(n.stem)}-[0-9a-f]{{8}}{re.escape(n.suffix)}" for n in paths))
    for path in folder.iterdir():
        if ours.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _flush_to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

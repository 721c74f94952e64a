"""Files that are whole or not there, and the folder of a run."""

import contextlib
import os
import re
import secrets
import socket
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


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all, as `write_atomic` does."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


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
    """Keep other runs out of a folder, which is made if it is not there. Raises OutputError if one is in it.

    The system drops the lock however the process ends, so that a killed run never blocks the next one; the file itself
    says nothing but who it is. filelock closes it in forked children: a decoding process that outlives a killed run
    does not keep the lock.
    """
    from filelock import FileLock, Timeout  # half the time of `dpm --help`, which imports this file

    path = folder / name
    lock = FileLock(path, timeout=0, fallback_to_soft=False)  # a soft lock would outlive a killed run
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"{folder} is in use by {_read_holder(path)}: wait until that run is over, or choose another --output"
        ) from None
    except OSError as error:
        raise OutputError(f"output folder {str(folder)!r} cannot be locked: {error.strerror or error}") from None
    try:
        with contextlib.suppress(OSError):  # Windows lets nobody write into a locked file
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may have been removed meanwhile
            path.unlink()
        lock.release()


def _read_holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")[:100] or "another process"
    return "another process"


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

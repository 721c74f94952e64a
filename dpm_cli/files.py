"""Write files whole or not at all, and guard the folder of a run."""

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dpm_cli.errors import OutputError, RunError

REPORT = "report.json"  # written last, so its presence means that the run is finished
CHECKPOINT = "checkpoint.pt"  # removed when the run is finished
METADATA = "model.json"  # beside exported files: class names, and how a picture becomes an input
LOCK = ".dpm-lock"  # exists while a run writes here
OUTPUTS = (
    "slim.pt",
    "model.ts",
    "model.onnx",
    "model.fp16.onnx",
    "model.pt2",
    METADATA,
    REPORT,
    "recipe.yaml",
    "metrics.jsonl",
)


def checkpoint_of(model: Path) -> Path:
    """Return the path of the checkpoint of a model in training: model.pt -> model.checkpoint.pt."""
    return model.with_name(f"{model.stem}.checkpoint.pt")


def previous_of(checkpoint: Path) -> Path:
    """Return the path of the checkpoint before the newest: checkpoint.pt -> checkpoint.previous.pt."""
    return checkpoint.with_name(f"{checkpoint.stem}.previous{checkpoint.suffix}")


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it, replacing any old file.

    On failure `path` is unchanged and the temporary file is removed. With `torch.save`, write to an open file rather
    than to a name: only then does a full disk raise OSError.
    Raises RunError if the file cannot be written (disk full, not writable).
    """
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")  # some writers depend on the suffix
    try:
        write(temporary)
        _flush_to_disk(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # When torch.save writes to an open file, closing the archive hides the file's "disk full" behind its own error.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise RunError(f"{path} cannot be written: {reason.strerror or reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some systems cannot flush a folder; the rename has already happened
        _flush_to_disk(path.parent, os.O_RDONLY)


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all, as `write_atomic` does."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def prepare_output(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Create the folder of a run, or check that a run may write into it.

    Existing results are only overwritten with `overwrite`. `resume` continues an unfinished run, or starts at the
    beginning if nothing was saved yet. Raises OutputError.
    """
    if overwrite and resume:
        raise OutputError("--resume continues a run and --overwrite starts it again: give one of them")
    require_writable(folder)
    remove_leftovers(folder, (*OUTPUTS, CHECKPOINT))
    if overwrite:
        return  # old files are replaced when the new run writes its own
    if is_unfinished(folder / CHECKPOINT):
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


def is_unfinished(checkpoint: Path) -> bool:
    """Tell whether a run was stopped here and can be resumed."""
    return checkpoint.exists() or previous_of(checkpoint).exists()


def require_writable(folder: Path) -> None:
    """Create the folder if it does not exist. Raises OutputError if it cannot be written."""
    probe = folder / f".dpm-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)  # permissions alone do not tell on read-only disks or as root
        probe.unlink()
    except FileExistsError:
        raise OutputError(f"{folder} is a file, not a folder: choose another --output") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"output folder {str(folder)!r} cannot be written: {reason}") from None


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Lock a folder against other runs, and create it if needed. Raises OutputError if another run uses it.

    The system drops the lock however the process ends, so a killed run never blocks the next one. The file only names
    its holder. filelock closes it in forked children, so a decoding process that outlives a killed run does not keep
    the lock.
    """
    from filelock import FileLock, Timeout  # imported here: it would double the time of `dpm --help`

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
        with contextlib.suppress(OSError):  # on Windows nobody can write to a locked file
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
    """Remove temporary files that a process left behind when it was killed while writing one of `names`."""
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

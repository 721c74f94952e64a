"""Write files whole or not at all, guard the folder of a run, and never touch a file there that is not ours.

No link is followed for what is written or removed; the folder of a run may itself be a link.
"""

import contextlib
import errno
import fnmatch
import mmap
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from dpm_cli.errors import OutputError, RunError

REPORT = "report.json"  # written last, so its presence means that the run is finished
METRICS = "metrics.jsonl"  # what happened when
CHECKPOINT = "checkpoint.pt"  # removed when the run is finished
PAGE = "report.html"  # what report.json and metrics.jsonl say, to look at
METADATA = "model.json"  # beside exported files: class names, and how a picture becomes an input
LOCK = ".dpm-lock"  # exists while a run writes here
HOLDER = "process "  # the first word in a lock
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # refuse to open a link, where the system can
MOST_TEXT = 8 << 20  # bytes of a report, a recipe or metadata
MAGIC = b"DPMCKPT1"  # the first bytes of a checkpoint
MARKS = {  # what a run writes -> bytes that every such file of ours holds
    "slim.pt": b"dpm-slim",
    "slim-*.pt": b"dpm-slim",
    "model.ts": b"dpm.json",
    "model.onnx": b"dpm_recipe",
    "model.fp16.onnx": b"dpm_recipe",
    "model.int8.onnx": b"dpm_recipe",
    "model.pt2": b"dpm.json",
    "model.xml": b"dpm_recipe",
    "model.bin": b"dpm-weights",  # of model.xml
    "model.pte": b"ET",  # its format has no place for more
    METADATA: b'"dpm_recipe"',
    PAGE: b'content="dpm"',
    REPORT: b'{\n  "arch"',
    "recipe.yaml": b"# resolved by dpm",
    METRICS: b'{"event"',
}


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

    Existing results are only overwritten with `overwrite`, and only files that carry our mark. `resume` continues an
    unfinished run, or starts at the beginning if nothing was saved yet. Raises OutputError.
    """
    if overwrite and resume:
        raise OutputError("--resume continues a run and --overwrite starts it again: give one of them")
    require_writable(folder)
    require_ours(written_in(folder))
    remove_leftovers(folder, (*MARKS, CHECKPOINT))
    if overwrite:
        return  # old files are replaced when the new run writes its own
    if is_unfinished(folder / CHECKPOINT):
        if not resume:
            raise OutputError(f"{folder} holds an unfinished run: --resume continues it, --overwrite starts anew")
        return
    if (folder / REPORT).exists():
        raise OutputError(f"{folder} holds a finished run: choose another folder, or --overwrite to replace it")
    present = [path.name for path in written_in(folder)]
    if present and not resume:
        raise OutputError(
            f"{folder} already holds {', '.join(present)}: choose another folder, or --overwrite to replace it"
        )


def is_unfinished(checkpoint: Path) -> bool:
    """Tell whether a run was stopped here and can be resumed."""
    return checkpoint.exists() or previous_of(checkpoint).exists()


def written_in(folder: Path) -> dict[Path, bytes]:
    """Map everything in a folder that bears the name of a run's file to the mark that such a file holds."""
    names = sorted(os.listdir(folder))  # glob would leave out links that lead nowhere
    found = {folder / name: mark for known, mark in MARKS.items() for name in fnmatch.filter(names, known)}
    return found | marks_of(folder / CHECKPOINT)


def parts_of(exported: Path) -> list[Path]:
    """List the files that an exported file consists of: the graph of OpenVINO has its weights beside it."""
    return [exported, exported.with_suffix(".bin")] if exported.suffix == ".xml" else [exported]


def size_of(exported: Path) -> int:
    """Count the bytes of an exported file, with all its parts that are there."""
    return sum(part.stat().st_size for part in parts_of(exported) if part.is_file())


def marks_of(checkpoint: Path) -> dict[Path, bytes]:
    """Map the checkpoints that exist to their mark."""
    return {path: MAGIC for path in (checkpoint, previous_of(checkpoint)) if os.path.lexists(path)}


def require_ours(marks: Mapping[Path, bytes]) -> None:
    """Raise OutputError that names the first path that is no regular file with its mark: it must not be replaced."""
    for path, mark in marks.items():
        if not _is_regular(path):
            raise OutputError(f"{path} is {_describe(path)}, not a file of dpm: move it, or choose another --output")
        if not _holds(path, mark):
            raise OutputError(f"{path} was not written by dpm: move it, or choose another --output")


def require_apart(inputs: Mapping[str, str | Path | None], outputs: Mapping[Path, bytes], folder: Path) -> None:
    """Refuse an input that a run would replace or remove.

    inputs: by what they are, as "the model". outputs: what exists of the run's files, as `written_in` returns it.
    Raises OutputError.
    """
    for what, given in inputs.items():
        if given is not None and any(_is_same(path, Path(given)) for path in outputs):
            raise OutputError(
                f"{what} {given} is among the files that a run writes into {folder}: choose another --output"
            )


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; links to one are followed. Raises OSError also for pipes and devices."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular_text(path: Path, *, errors: str = "strict") -> str:
    """Read UTF-8 text of a regular file, which must not be larger than any text of ours: what is parsed from it takes
    twenty times its size. Raises OSError or UnicodeDecodeError.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_TEXT:
            raise OSError(errno.EFBIG, f"larger than {MOST_TEXT} bytes", str(path))
        return file.read(MOST_TEXT).decode("utf-8", errors)


def require_writable(folder: Path) -> None:
    """Create the folder if it does not exist. Raises OutputError if it cannot be written."""
    require_utf8(folder)
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


def require_space(folder: Path, needed: int) -> None:
    """Raise OutputError unless the disk of a folder, which may not exist yet, has so many bytes free."""
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, and the run may need {needed / 1e6:,.0f} MB: "
            "free some, or choose another --output"
        )


def require_utf8(path: Path) -> None:
    """Raise OutputError for a name that is not UTF-8: some libraries could not write there, after all the training."""
    if not str(path).isprintable() and any("\ud800" <= char <= "\udfff" for char in str(path)):
        raise OutputError(f"the name {os.fsencode(path)!r} is not UTF-8: choose another --output")


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK, *, wanted: bool = True) -> Iterator[None]:
    """Lock a folder against other runs, and create it if needed. Raises OutputError if another run uses it.

    wanted: false on a file system that cannot lock, where the user sees to it that no other run writes here.

    The system drops the lock however the process ends, so a killed run never blocks the next one. The file only names
    its holder. filelock closes it in forked children, so a decoding process that outlives a killed run does not keep
    the lock.
    """
    from filelock import FileLock, Timeout  # imported here: it would double the time of `dpm --help`

    path = folder / name
    if not wanted:
        yield
        return
    if os.path.lexists(path) and not _is_regular(path):
        raise OutputError(f"{path} is {_describe(path)}, not a lock of dpm: remove it, or choose another --output")
    if not _is_lock(path):
        raise OutputError(f"{path} is no lock of dpm: move it, or choose another --output")
    lock = FileLock(path, timeout=0, fallback_to_soft=False)  # a soft lock would outlive a killed run
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"{folder} is in use by {_read_holder(path)}: wait until that run is over, or choose another --output"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"output folder {str(folder)!r} cannot be locked: {reason}; --no-lock does without, if no other run "
            "writes there"
        ) from None
    try:
        with contextlib.suppress(OSError):  # on Windows nobody can write to a locked file
            descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | NO_LINK)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{HOLDER}{os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may have been removed meanwhile
            path.unlink()
        lock.release()


def _is_lock(path: Path) -> bool:
    """Tell whether a lock could be made here: there is nothing yet, or one of ours that was left behind."""
    try:
        with open_regular(path) as file:
            return file.read(len(HOLDER)) in (b"", HOLDER.encode())
    except OSError:
        return True  # there is none, or locking it tells why it cannot be


def find_holder(path: Path) -> str | None:
    """Say who holds a lock file; None if nobody does. Changes nothing, and holds it for no longer than it asks."""
    try:
        import fcntl
    except ImportError:
        return _read_holder(path) if _is_regular(path) else None  # on Windows the file is there as long as its lock
    if not _is_regular(path):
        return None
    with contextlib.suppress(OSError), open_regular(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_holder(path)
    return None


def _read_holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return read_regular_text(path)[:100] or "another process"
    return "another process"


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove temporary files that a process left behind when it was killed while writing one of `names`."""
    for path in find_leftovers(folder, names):
        path.unlink(missing_ok=True)


def find_leftovers(folder: Path, names: Iterable[str]) -> list[Path]:
    """Find temporary files of `write_atomic` for one of `names`, which may hold a `*`."""
    paths = [Path(name) for name in names]
    stems = ((re.escape(path.stem).replace(r"\*", ".*"), re.escape(path.suffix)) for path in paths)
    ours = re.compile("|".join(rf"\.{stem}-[0-9a-f]{{8}}{suffix}" for stem, suffix in stems))
    return [path for path in sorted(folder.iterdir()) if ours.fullmatch(path.name) and _is_regular(path)]


def _flush_to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_regular(path: Path) -> bool:
    """Tell whether this is a regular file itself, not a link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _is_same(left: Path, right: Path) -> bool:
    try:
        return left.samefile(right)
    except OSError:
        return False


def _describe(path: Path) -> str:
    """Say what a path is that is no regular file."""
    if path.is_symlink():
        return "a link"
    return "a folder" if path.is_dir() else "a pipe or device"


def _holds(path: Path, mark: bytes) -> bool:
    """Tell whether a file holds these bytes (a checkpoint: begins with them). An empty file has nothing to lose."""
    try:
        with open_regular(path) as file:
            if not os.fstat(file.fileno()).st_size:
                return True
            if mark == MAGIC:
                return file.read(len(MAGIC)) == MAGIC
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(mark) >= 0
    except (OSError, ValueError):
        return False

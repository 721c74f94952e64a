"""Turn errors into one line per problem and an exit code, never a traceback."""

import contextlib
import csv
import errno
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from typing import Any, TextIO

import typer

from dpm_cli.errors import DpmError, RecipeError, ToldElsewhere

# Older typer uses click's UsageError, newer typer a copy of it; BadParameter derives from either.
WrongUsage: type[Exception] = typer.BadParameter.__mro__[1]

INTERRUPTED = 130
NO_ROOM = ("failed to map segment", "Cannot allocate memory", "cannot allocate memory")  # of libraries, to the loader
LONGEST_LINE = 1200  # characters
CLOSED_PIPE = 141  # what a shell reports of a program that SIGPIPE ended
ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE}


def print_json(document: object) -> None:
    """Print the one JSON document of a command."""
    print(json.dumps(document, indent=2))


def print_csv(kind: type, rows: Iterable[Any]) -> None:
    """Print dataclasses of a kind as comma-separated values, with a header. There may be none."""
    writer = csv.DictWriter(sys.stdout, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)


@contextlib.contextmanager
def libraries_on_stderr() -> Iterator[None]:
    """Send to stderr what libraries print, so that stdout holds only results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def fail(error: BaseException, *, as_json: bool) -> int:
    """Tell the user what went wrong; return the exit code."""
    if isinstance(error, ToldElsewhere):
        return error.exit_code
    problems, code = explain(error)
    with _giving_up_when_full(sys.stdout):
        sys.stdout.flush()
    with _giving_up_when_full(sys.stderr):
        for problem in problems:
            print(problem, file=sys.stderr)
        sys.stderr.flush()
    with _giving_up_when_full(sys.stdout):
        if as_json:
            print_json({"error": "; ".join(problem.removeprefix("error: ") for problem in problems), "exit_code": code})
        flush()
    return code


@contextlib.contextmanager
def _giving_up_when_full(stream: TextIO) -> Iterator[None]:
    """Turn a stream to the null device when it cannot be written: Python would complain at exit."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        _redirect_to_null(stream)


def open_closed_streams() -> None:
    """Open the null device in place of streams that were closed before the start.

    Otherwise print fails, or the next file that is opened takes the stream's number and gets its text.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def print_error(text: object) -> None:
    """Print one line about an error on stderr."""
    print(f"error: {_one_line(text)}", file=sys.stderr)


def explain(error: BaseException) -> tuple[list[str], int]:
    """Return the lines for the user, and the exit code."""
    match error:
        case RecipeError():
            return [f"error: {_one_line(problem)}" for problem in error.problems], error.exit_code
        case DpmError():
            return [f"error: {_one_line(error.in_cli or error)}"], error.exit_code
        case KeyboardInterrupt():
            return ["error: interrupted"], INTERRUPTED
        case WrongUsage():
            return [f"error: {_one_line(_usage(error))}"], 2
        case OSError(errno=number) if number in ENVIRONMENT:
            place = f"{error.filename}: " if error.filename else ""
            return [f"error: {place}{error.strerror}"], 1
        case ImportError() if any(reason in str(error) for reason in NO_ROOM):
            return [f"error: out of memory: a library cannot be loaded ({error}); see ulimit -v and -d"], 1
        case _ if _is_out_of_memory(error):
            return ["error: out of memory: lower data.batch, for example --set data.batch=32"], 1
        case _:
            return [_report_bug(error)], 1


def _usage(error: Any) -> str:
    """Say what is wrong with the arguments, and where the right ones are listed."""
    command = error.ctx.command_path if error.ctx else "dpm"
    message = error.format_message().rstrip(".").replace("Value error, ", "")  # pydantic's, which checks choices
    return f"{message}; see {command} --help"


def _is_out_of_memory(error: BaseException) -> bool:
    """Compare names of classes, because torch may not have been imported."""
    is_torch = type(error).__name__ in ("OutOfMemoryError", "RuntimeError")
    return isinstance(error, MemoryError) or (
        is_torch and ("out of memory" in str(error) or "can't allocate memory" in str(error))
    )


def _report_bug(error: BaseException) -> str:
    """Save the traceback to a file; return a line that names it."""
    text = "".join(traceback.format_exception(error))
    if os.environ.get("DPM_DEBUG"):
        sys.stderr.write(text)
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="dpm-", suffix=".log", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(text)
        place = f"traceback in {file.name}"
    except OSError:
        place = "set DPM_DEBUG=1 to see the traceback"
    return f"internal error: {type(error).__name__}: {_one_line(error)[:200]}; please report it, {place}"


def _one_line(text: object) -> str:
    """Remove line breaks, characters that would steer a terminal, and the middle of very long texts."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 300]} ... {line[-300:]}"


def flush() -> None:
    """Flush both streams, so that BrokenPipeError is raised here and not at exit, where Python would complain."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None
    sys.stderr.flush()


def silence_closed_pipe() -> int:
    """Print nothing more, because the reader (`head`, a pager) has gone; return the exit code."""
    _redirect_to_null(sys.stdout, sys.stderr)
    return CLOSED_PIPE


def _redirect_to_null(*streams: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):  # not every stream has a descriptor
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in streams:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nothing, stream.fileno())

"""The errors a user can meet. Each is one line: the thing, the value, the way out.

DpmError                    exit code 1
├── RunError                1  the run failed (non-finite loss, outputs changed, export differs, disk full)
├── UsageError              2  a wrong argument
│   ├── RecipeError         2  a recipe that cannot be used
│   ├── ModelFileError      2  a model file that cannot be loaded
│   ├── UnsupportedModelError 2  a model that cannot be analysed
│   ├── DataError           2  data that is not there or not as described
│   └── OutputError         2  an output folder that cannot be used
├── TargetError             3  the target cannot be, or was not, met
├── AccuracyError           4  an accuracy floor was broken
├── Interrupted             130  stopped by the user; resumable
└── ToldElsewhere           of several processes, another one says what happened
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any


class DpmError(Exception):
    """Base of everything a user can cause or must be told; `exit_code` is what the command line returns."""

    exit_code = 1


class RunError(DpmError):
    """The run failed: the message says at which step and what remains."""


class UsageError(DpmError):
    """A wrong argument."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be used. `problems` lists every mistake, one line each."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class ModelFileError(UsageError):
    """A model file that cannot be loaded."""


class UnsupportedModelError(UsageError):
    """A model that cannot be analysed, with the layer and the reason."""


class DataError(UsageError):
    """Data that is not there, or not as described."""


class OutputError(UsageError):
    """An output folder that cannot be used."""


class TargetError(DpmError):
    """The target cannot be met (before training, with the achievable range) or was not met."""

    exit_code = 3


class AccuracyError(DpmError):
    """An accuracy floor was broken. `report` is that of the run, which has written all its files."""

    exit_code = 4

    def __init__(self, message: str, *, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class Interrupted(DpmError):
    """Stopped by the user; the message says how to continue."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ToldElsewhere(DpmError):
    """This process ends because another one of the run failed, which tells the user why. Not to be shown."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run failed")
        self.exit_code = exit_code


def one_line(error: BaseException, *, root_cause: bool = False) -> str:
    """Tell the kind and the message of an exception that foreign code raised.

    root_cause: tell the first line of the exception that started it all; exporters wrap that in pages of advice.
    """
    while root_cause and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    message = flatten(lines[0] if root_cause and lines else error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def flatten(text: object) -> str:
    """Put a foreign message on one line of at most 200 characters."""
    return " ".join(str(text).split())[:200]


def listing(names: Iterable[str], shown: int = 3) -> str:
    """List the first names and count the others: "a, b, c and 2 more"."""
    rest = iter(names)
    listed = ", ".join(islice(rest, shown))
    more = sum(1 for _ in rest)
    return f"{listed} and {more} more" if more else listed

"""Define the errors a user can meet. Each message is one line that names the thing, the value and the way out.

DpmError                    exit code 1
├── RunError                1  the run failed (non-finite loss, outputs changed, export differs, disk full)
│   └── FormatError         1  a file format that cannot hold a model
├── UsageError              2  a wrong argument
│   ├── RecipeError         2  a recipe that cannot be used
│   ├── ModelFileError      2  a model file that cannot be loaded
│   ├── UnsupportedModelError 2  a model that cannot be analysed, trained or exported
│   ├── DataError           2  data that is missing or not as described
│   │   └── UnreadableError 2  pictures that cannot be read, with what others show
│   └── OutputError         2  an output folder that cannot be used
├── MissedError             1  the result is not what was asked for
│   ├── TargetError         3  the target cannot be met, or was not met
│   └── AccuracyError       4  an accuracy floor was broken
├── Interrupted             130  stopped by the user; resumable
└── ToldElsewhere           another process of the run reports the failure
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any


class DpmError(Exception):
    """All errors that a user should see derive from this; the command line returns `exit_code`.

    in_cli: the message in the words of the command line, where the way out is another one than in Python.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, in_cli: str | None = None) -> None:
        super().__init__(message)
        self.in_cli = in_cli


class RunError(DpmError):
    """The run failed; the message says at which step, and what can be resumed."""


class FormatError(RunError):
    """A file format cannot hold what this model computes; the message names what it cannot, and a format that can."""


class UsageError(DpmError):
    """An argument is wrong."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe cannot be used. `problems` lists every mistake, one line each."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class ModelFileError(UsageError):
    """A model file cannot be loaded."""


class UnsupportedModelError(UsageError):
    """A model cannot be analysed, trained or exported; the message names the layer, if one is to blame, and why."""


class DataError(UsageError):
    """Data is missing or not as described."""


class UnreadableError(DataError):
    """Some pictures cannot be read. `predicted` holds a result for each picture, in order: classes, or its error."""

    def __init__(self, message: str, *, predicted: Any) -> None:
        super().__init__(message)
        self.predicted = predicted


class OutputError(UsageError):
    """An output folder cannot be used."""


class MissedError(DpmError):
    """The result is not what was asked for. If a run has written all its files, `report` is its report."""

    def __init__(self, message: str, *, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class TargetError(MissedError):
    """The target cannot be met (raised before training, with the achievable range), or was not met."""

    exit_code = 3


class AccuracyError(MissedError):
    """An accuracy floor was broken."""

    exit_code = 4


class Interrupted(DpmError):
    """The user stopped the run; the message says how to continue."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ToldElsewhere(DpmError):
    """This process ends because another process of the run failed. That one tells the user why, so do not show this."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run failed")
        self.exit_code = exit_code


def one_line(error: BaseException, *, root_cause: bool = False) -> str:
    """Describe an exception from foreign code by its type and message, on one line.

    root_cause: use the first line of the exception that started the chain; exporters wrap it in pages of advice.
    """
    while root_cause and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    message = flatten(lines[0] if root_cause and lines else error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def flatten(text: object) -> str:
    """Join the lines of a foreign message and cut it to 200 characters."""
    return " ".join(str(text).split())[:200]


def listing(names: Iterable[str], shown: int = 3) -> str:
    """List the first names and count the others: "a, b, c and 2 more"."""
    rest = iter(names)
    listed = ", ".join(islice(rest, shown))
    more = sum(1 for _ in rest)
    return f"{listed} and {more} more" if more else listed

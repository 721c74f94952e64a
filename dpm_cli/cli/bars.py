"""Draw bars that fit any terminal: what does not fit is dropped, the least useful first."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

NAME, PERCENT, TIME = 9, 4, 7  # columns of the terminal
BARS = {100: 20, 60: 14, 0: 8}  # columns of the bar, on terminals from this many columns on


@contextlib.contextmanager
def show_bars() -> Iterator["Bars"]:
    """Show bars on stderr; lines that are printed meanwhile scroll by above them."""
    console = Console(stderr=True, highlight=False)
    bar = next(bar for width, bar in BARS.items() if console.width >= width)
    progress = Progress(
        TextColumn(f"{{task.description:<{NAME}.{NAME}}}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=bar),
        _Percentage(),
        _Time(),
        _Readings(console, bar),
        console=console,
    )
    with progress:
        yield Bars(progress)


class Bars:
    """Holds one bar for each stage; a phase without steps has one only while it lasts."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None
        self._is_phase = False
        self._readings: list[str] = []

    def begin(self, name: str, what: str = "") -> None:
        """what: said beside a phase without steps."""
        self.finish()
        self._readings, self._is_phase = [what], bool(what)
        self._task = self._progress.add_task(name, total=None, readings=[what])

    def advance(self, step: int, steps: int, reading: str) -> None:
        """Say how far the stage is. reading: takes the place of the first one."""
        self._readings[:1] = [reading]
        self._progress.update(self._task, total=steps, completed=step, readings=list(self._readings))

    def read(self, readings: Sequence[str]) -> None:
        """Show what was measured, most useful first."""
        self._readings = list(readings)
        self._progress.update(self._task, readings=list(self._readings))

    def finish(self) -> None:
        task = next((task for task in self._progress.tasks if task.id == self._task), None)
        if task is None:
            return
        if self._is_phase or task.total is None:
            self._progress.remove_task(task.id)
        else:
            self._progress.update(task.id, completed=task.total)
        self._task = None

    def print(self, line: str) -> None:
        self._progress.console.print(line, markup=False)


class _Percentage(TaskProgressColumn):
    """Shows how much is done, and nothing while that is unknown."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(min_width=PERCENT, no_wrap=True))

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.percentage:>3.0f}%")


class _Time(TimeRemainingColumn):
    """Shows the remaining time, or the time that a finished stage or a phase without steps has taken."""

    max_refresh = 0.2

    def __init__(self) -> None:
        super().__init__(compact=True, elapsed_when_finished=True, table_column=Column(min_width=TIME, no_wrap=True))

    def render(self, task: Task) -> Text:
        if task.total is not None:
            return super().render(task)
        minutes, seconds = divmod(int(task.elapsed or 0), 60)
        return Text(f"{minutes:02}:{seconds:02}", style="progress.elapsed")


class _Readings(ProgressColumn):
    """Shows as many readings as fit."""

    def __init__(self, console: Console, bar: int) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._console, self._taken = console, NAME + bar + PERCENT + TIME + 4  # with a blank after each column

    def render(self, task: Task) -> Text:
        return Text(fit(task.fields["readings"], self._console.width - self._taken))


def fit(readings: Sequence[str], width: int) -> str:
    """Join the readings that fit, in order; the first that does not ends the line."""
    line = ""
    for reading in readings:
        longer = f"{line}  {reading}" if line else reading
        if len(longer) > width:
            break
        line = longer
    return line

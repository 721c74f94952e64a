"""Show on stderr what a run does: bars on a terminal, otherwise one plain line per epoch, round and removal."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from dpm_cli.cli import numbers
from dpm_cli.cli.outcome import libraries_on_stderr
from dpm_cli.events import (
    Done,
    EpochEnded,
    Event,
    Exported,
    Measuring,
    Note,
    Resumed,
    RoundStarted,
    StageBegan,
    Started,
    StepTaken,
    UnitsRemoved,
    WeightsCut,
    WentBack,
)

Tell = Callable[[Event], None]


@contextlib.contextmanager
def follow(*, quiet: bool, as_json: bool) -> Iterator[Tell]:
    """Yield a function that shows the events it is called with."""
    with libraries_on_stderr():
        if quiet:
            yield lambda event: None
        elif as_json or not _is_terminal():
            yield print_line
        else:
            with show_bars() as tell:
                yield tell


def print_line(event: Event) -> None:
    line = describe(event)
    if line:
        with contextlib.suppress(OSError):  # a reader that has gone must not end hours of training
            print(line, file=sys.stderr, flush=True)


def describe(event: Event) -> str | None:
    """Describe an event in one line. Returns None for steps, checkpoints and other events that need no line."""
    match event:
        case Started():
            return _describe_start(event)
        case Resumed(stage=stage, step=step, path=path):
            return f"resumed in stage {stage} after step {step}, from {path}"
        case EpochEnded(stage=stage, epoch=epoch, epochs=epochs):
            return f"{stage} {epoch}/{epochs}  " + "  ".join(_readings(event))
        case RoundStarted():
            return _describe_round(event)
        case UnitsRemoved(round=number, removed=removed, released=released):
            return f"round {number}  {removed} units removed, {released} released  now {_costs(event)}"
        case WentBack(culprit=culprit, validation_accuracy=accuracy, floor=floor):
            broken = f"validation {numbers.percent(accuracy)} is below {numbers.percent(floor)}"
            return f"{culprit} broke the accuracy floor: {broken}  back to {_costs(event)}"
        case WeightsCut():
            return _describe_cut(event)
        case Exported(path=path, max_difference=difference):
            return f"exported {path}  agrees {numbers.agreement(difference)}"
        case Measuring(what=what):
            return f"measuring {what}"
        case Note(text=text):
            return f"note: {text}"
        case _:
            return None


def _describe_start(event: Started) -> str:
    target, dense = event.target, event.dense
    if target.limit is None:
        wanted = ", ".join(f"{sparsity:g}" for sparsity in target.asked)
    else:
        wanted = f"≤ {numbers.cost(target.kind, target.limit)}"
    return (
        f"{event.arch or 'model'}  {numbers.count(dense.macs)} MACs  {numbers.count(dense.params)} parameters  "
        f"{dense.channels} units  target {target.kind} {wanted}  {event.device} {event.precision}"
    )


def _describe_round(event: RoundStarted) -> str:
    planned = f"round {event.round}/{event.rounds}"
    if event.condemning:
        return f"{planned}  units start to decay as soon as they are condemned"
    extra = " to meet the target" if event.round > event.rounds else ""
    return (
        f"{planned}  {event.chosen} units start to decay{extra}  leads to {numbers.count(event.predicted_macs)} MACs, "
        f"{numbers.count(event.predicted_params)} parameters"
    )


def _describe_cut(event: WeightsCut) -> str:
    accuracies = {
        "dense": event.dense,
        "cut": event.cut,
        "recovered": event.recovered,
        "recalibrated": event.recalibrated,
    }
    measured = [f"{name} {numbers.percent(value)}" for name, value in accuracies.items() if value is not None]
    return f"cut to sparsity {event.reached:.3f}  {numbers.size(event.bytes)}  " + "  ".join(measured)


def _costs(event: UnitsRemoved | WentBack) -> str:
    """Say what is left."""
    return f"{numbers.count(event.macs)} MACs, {numbers.count(event.params)} parameters"


def _readings(epoch: EpochEnded) -> list[str]:
    """List the measurements of an epoch, loss first."""
    accuracy = epoch.validation_accuracy
    return [
        f"loss {epoch.loss:.3f}",
        *([] if accuracy is None else [f"validation {numbers.percent(accuracy, 1)}"]),
        f"lr {epoch.lr:.2g}",
        f"{epoch.images_per_second:.0f} images/s",
        f"waiting for data {numbers.percent(100 * epoch.waiting_for_data, 0)}",
    ]


@contextlib.contextmanager
def show_bars() -> Iterator[Tell]:
    """Show one bar per stage; lines about rounds and removals scroll by above them."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    progress = Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description:<8}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}", markup=False),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=Console(stderr=True, highlight=False),
    )
    with progress:
        yield Bars(progress).show


class Bars:
    """Draws events on a rich Progress."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._readings = ""
        self._task = progress.add_task("loading", total=None, state="")

    def show(self, event: Event) -> None:
        match event:
            case StageBegan(name=name):
                self._begin(name)
            case StepTaken(epoch=epoch, epochs=epochs, step=step, steps=steps):
                state = f"epoch {epoch}/{epochs}  {self._readings}"
                self._progress.update(self._task, total=steps, completed=step, state=state)
            case EpochEnded(epoch=epoch, epochs=epochs):
                self._readings = "  ".join(reading for reading in _readings(event) if not reading.startswith("lr"))
                self._progress.update(self._task, state=f"epoch {epoch}/{epochs}  {self._readings}")
            case Measuring():
                self._begin("measure")
            case Done():
                self._finish()
            case _ if line := describe(event):
                self._progress.console.print(line, markup=False)

    def _begin(self, name: str) -> None:
        self._finish()
        self._readings = ""
        self._task = self._progress.add_task(name, total=None, state="")

    def _finish(self) -> None:
        task = self._progress.tasks[-1]
        if task.total is None:
            self._progress.remove_task(self._task)
        else:
            self._progress.update(self._task, completed=task.total)


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

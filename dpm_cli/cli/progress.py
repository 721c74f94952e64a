"""Show on stderr what a run does: bars on a terminal, otherwise one plain line per epoch, round and removal."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from dpm_cli.cli import numbers
from dpm_cli.cli.outcome import libraries_on_stderr
from dpm_cli.report import Event

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
    """One line about an event; none about steps and checkpoints."""
    match event["event"]:
        case "start":
            dense, target = event["dense"], event["target"]
            kind = target["kind"]
            wanted = (
                ", ".join(f"{sparsity:g}" for sparsity in target["asked"])
                if kind == "sparsity"
                else f"≤ {numbers.cost(kind, target['limit'])}"
            )
            return (
                f"{event['arch'] or 'model'}  {numbers.count(dense['macs'])} MACs  "
                f"{numbers.count(dense['params'])} parameters  {dense['channels']} units  "
                f"target {kind} {wanted}  {event['device']} {event['precision']}"
            )
        case "resumed":
            return f"resumed in stage {event['stage']} after step {event['step']}, from {event['path']}"
        case "epoch":
            return f"{event['stage']} {event['epoch']}/{event['epochs']}  " + "  ".join(_readings(event))
        case "round":
            if event["condemning"]:
                return f"round {event['round']}/{event['rounds']}  units start to decay as soon as they are condemned"
            extra = " to meet the target" if event["round"] > event["rounds"] else ""
            return (
                f"round {event['round']}/{event['rounds']}  {event['chosen']} units start to decay{extra}  "
                f"leads to {numbers.count(event['predicted_macs'])} MACs, "
                f"{numbers.count(event['predicted_params'])} parameters"
            )
        case "compact":
            return (
                f"round {event['round']}  {event['removed']} units removed, {event['released']} released  "
                f"now {numbers.count(event['macs'])} MACs, {numbers.count(event['params'])} parameters"
            )
        case "back":
            return (
                f"{event['culprit']} broke the accuracy floor: validation "
                f"{numbers.percent(event['validation_accuracy'])} is below {numbers.percent(event['floor'])}  "
                f"back to {numbers.count(event['macs'])} MACs, {numbers.count(event['params'])} parameters"
            )
        case "cut":
            bytes_ = numbers.size(event["bytes"])
            return f"cut to sparsity {event['reached']:.3f}  {bytes_}  " + _describe_recovery(event)
        case "export":
            return f"exported {event['path']}  agrees {numbers.agreement(event['max_difference'])}"
        case "measure":
            return f"measuring {event['what']}"
        case "note":
            return f"note: {event['text']}"
        case _:
            return None


def _describe_recovery(event: Event) -> str:
    accuracies = [f"{name} {numbers.percent(event[name])}" for name in RECOVERY if event[name] is not None]
    return "  ".join(accuracies)


RECOVERY = ("dense", "cut", "recovered", "recalibrated")


def _readings(event: Event) -> list[str]:
    """Of an epoch, loss first."""
    accuracy = event["validation_accuracy"]
    return [
        f"loss {event['loss']:.3f}",
        *([] if accuracy is None else [f"validation {numbers.percent(accuracy, 1)}"]),
        f"lr {event['lr']:.2g}",
        f"{event['images_per_second']:.0f} images/s",
        f"waiting for data {numbers.percent(100 * event['waiting_for_data'], 0)}",
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
        match event["event"]:
            case "stage":
                self._begin(event["name"])
            case "step":
                state = f"epoch {event['epoch']}/{event['epochs']}  {self._readings}"
                self._progress.update(self._task, total=event["steps"], completed=event["step"], state=state)
            case "epoch":
                self._readings = "  ".join(reading for reading in _readings(event) if not reading.startswith("lr"))
                self._progress.update(self._task, state=f"epoch {event['epoch']}/{event['epochs']}  {self._readings}")
            case "measure":
                self._begin("measure")
            case _ if line := describe(event):
                self._progress.console.print(line, markup=False)
            case "done":
                self._finish()

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

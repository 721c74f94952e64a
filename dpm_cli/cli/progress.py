"""Show on stderr what a run does: bars on a terminal, otherwise one plain line per epoch, round and removal."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dpm_cli.cli.lines import describe, readings
from dpm_cli.cli.outcome import libraries_on_stderr
from dpm_cli.display import numbers
from dpm_cli.events import Done, EpochEnded, Event, FilesDecoded, PhaseBegan, StageBegan, Started, StepTaken

if TYPE_CHECKING:
    from dpm_cli.cli.bars import Bars

PATIENCE = 2.0  # seconds
Tell = Callable[[Event], None]


@contextlib.contextmanager
def follow(*, quiet: bool, as_json: bool) -> Iterator[Tell]:
    """Yield a function that shows the events it is called with."""
    with libraries_on_stderr():
        if quiet:
            yield lambda event: None
        elif as_json or not is_terminal():
            lines = Lines()
            try:
                yield lines.show
            finally:
                lines.be_silent()
        else:
            from dpm_cli.cli.bars import show_bars  # imported here: rich would slow `dpm --help`

            with show_bars() as bars:
                yield Drawing(bars).show


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal that a command without events is at work, and for how long; libraries print to stderr."""
    with libraries_on_stderr():
        if not is_terminal():
            yield
            return
        from dpm_cli.cli.bars import show_bars

        with show_bars() as bars:
            bars.begin("working", what)
            yield
            bars.finish()


def is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Lines:
    """Prints plain lines. Those of epochs say how long the run has taken and will take.

    A phase without steps is told only if it lasts, so that a wrong argument ends in one line.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._start = clock, clock()
        self._plan: list[tuple[str, int]] = []  # name and steps of every stage, in order
        self._place = -1  # of the current stage in the plan
        self._first: int | None = None  # steps of all stages that were done before the first one seen here
        self._done, self._began = 0, self._start
        self._phase = threading.Timer(0, self._print, [""])

    def show(self, event: Event) -> None:
        if isinstance(event, FilesDecoded):  # the phase goes on
            return
        self.be_silent()
        line = describe(event)
        match event:
            case PhaseBegan(what=what):
                self._phase, line = threading.Timer(PATIENCE, self._print, [what]), None
                self._phase.daemon = True
                self._phase.start()
            case Started(stages=stages):
                self._plan = [(stage.name, stage.steps) for stage in stages]
            case StageBegan(name=name):
                self._enter(name)
            case StepTaken(stage=stage, step=step, steps=steps):
                self._count(stage, step, steps)
            case EpochEnded():
                line = f"{line}  {self._times()}"
        if line:
            self._print(line)

    def be_silent(self) -> None:
        """Do not tell the current phase. Call at the end, however that comes."""
        self._phase.cancel()

    def _print(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone must not end hours of training
            print(line, file=sys.stderr, flush=True)

    def _enter(self, name: str) -> None:
        """Find the next stage of this name; an accuracy floor can bring an earlier one back."""
        places = [place for place, (stage, _) in enumerate(self._plan) if stage == name]
        self._place = next((place for place in places if place > self._place), places[0] if places else -1)
        if self._first is None:
            self._began = self._clock()

    def _count(self, stage: str, step: int, steps: int) -> None:
        if self._place < 0:  # dpm train has one stage, and no plan
            self._plan, self._place = [(stage, steps)], 0
        self._done = sum(steps for _, steps in self._plan[: self._place]) + step
        if self._first is None:
            self._first = self._done - 1

    def _times(self) -> str:
        now, taken = self._clock(), self._done - (self._first or 0)
        steps_left = sum(steps for _, steps in self._plan) - self._done
        elapsed = f"elapsed {numbers.duration(now - self._start)}"
        if taken <= 0 or steps_left <= 0:
            return elapsed
        return f"{elapsed}, {numbers.duration((now - self._began) / taken * steps_left)} of training left"


class Drawing:
    """Draws events as bars: one a stage, and one a phase that has no steps."""

    def __init__(self, bars: "Bars") -> None:
        self._bars = bars
        bars.begin("load")

    def show(self, event: Event) -> None:
        bars = self._bars
        match event:
            case StageBegan(name=name):
                bars.begin(name)
            case StepTaken(epoch=epoch, epochs=epochs, step=step, steps=steps):
                bars.advance(step, steps, f"epoch {epoch}/{epochs}")
            case EpochEnded(epoch=epoch, epochs=epochs):
                useful = [reading for reading in readings(event) if not reading.startswith("lr")]
                bars.read([f"epoch {epoch}/{epochs}", *useful])
            case PhaseBegan(name=name, what=what):
                bars.begin(name, what)
            case FilesDecoded(split=split, decoded=decoded, files=files):
                bars.advance(decoded, files, f"decoding {split} images")
            case Done():
                bars.finish()
            case _ if line := describe(event):
                bars.print(line)

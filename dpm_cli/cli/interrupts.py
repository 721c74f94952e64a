"""Ctrl-C and SIGTERM: a run that trains saves a checkpoint and stops between two steps; the second stops at once."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from dpm_cli.report import Event

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Stop:
    """Whether the user wants the run to stop. Give every event of the run to `watch`."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._is_training = False
        self._is_last_step = False  # of its stage

    def is_wanted(self) -> bool:
        return self._signal is not None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(signal.Signals(self._signal), 130) if self._signal is not None else 130

    def watch(self, event: Event) -> None:
        """Between the first step of a stage and its last checkpoint a signal waits for the end of a step.

        Raises KeyboardInterrupt if one came too late for that, when everything is saved anyway.
        """
        match event:
            case {"event": "step", "step": step, "steps": steps}:
                self._is_training, self._is_last_step = True, step >= steps
            case {"event": "checkpoint"} if self._is_training and self._is_last_step:
                self._is_training = False
                if self.is_wanted():
                    raise KeyboardInterrupt

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Raises KeyboardInterrupt when there is nothing to save first, or at the second signal."""
        is_second, self._signal = self.is_wanted(), number
        if is_second or not self._is_training:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_between_steps() -> Iterator[Stop]:
    """Catch SIGINT and SIGTERM within; afterwards they do what they did before."""
    stop = Stop()
    earlier = {number: signal.signal(number, stop.receive) for number in EXIT_CODES}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)

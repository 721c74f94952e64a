"""Handle Ctrl-C and SIGTERM: the first makes a training run save a checkpoint and stop, the second stops it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from dpm_cli.errors import Interrupted
from dpm_cli.events import CheckpointWritten, Event, Note, StepTaken
from dpm_cli.files import is_unfinished

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Stop:
    """Whether the user wants the run to stop. Hand `listening(...)` to the run as `on_event`."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._is_training = False
        self._is_last_step = False  # of its stage
        self._is_announced = False
        _interrupted.clear()

    def is_wanted(self) -> bool:
        return self._signal is not None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(signal.Signals(self._signal), 130) if self._signal is not None else 130

    def listening(self, tell: Callable[[Event], None]) -> Callable[[Event], None]:
        """Return `tell`, extended to watch every event, and to say once that the run will stop at a checkpoint."""

        def tell_and_watch(event: Event) -> None:
            tell(event)
            if self.is_wanted() and not self._is_announced:
                self._is_announced = True
                tell(Note("saving a checkpoint to stop here; a second Ctrl-C stops at once"))
            self.watch(event)

        return tell_and_watch

    def watch(self, event: Event) -> None:
        """Note whether a stage is between its first step and its last checkpoint, when a signal waits for a step's end.

        Raises KeyboardInterrupt at the last checkpoint if a signal came after the last step: everything is saved.
        """
        match event:
            case StepTaken(step=step, steps=steps):
                self._is_training, self._is_last_step = True, step >= steps
            case CheckpointWritten() if self._is_training and self._is_last_step:
                self._is_training = False
                if self.is_wanted():
                    raise KeyboardInterrupt

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. Raises KeyboardInterrupt if there is nothing to save first, or if it is the second one."""
        is_second, self._signal = self.is_wanted(), number
        if is_second or not self._is_training:
            interrupt_once(number, frame)


_interrupted: list[int] = []  # the signals that have raised KeyboardInterrupt in this command


def interrupt_once(number: int, frame: FrameType | None) -> None:
    """Handle a signal: raise KeyboardInterrupt. A further one, while that tidies up, ends the process at once."""
    if _interrupted:
        os._exit(EXIT_CODES.get(signal.Signals(number), 130))
    _interrupted.append(number)
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Tell whether a signal has stopped this command; libraries may turn that into errors of their own."""
    return bool(_interrupted)


@contextlib.contextmanager
def catching_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt once inside this context; restore the earlier handler at its end."""
    _interrupted.clear()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    earlier = signal.signal(signal.SIGINT, interrupt_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


@contextlib.contextmanager
def stop_between_steps() -> Iterator[Stop]:
    """Catch SIGINT and SIGTERM inside this context; restore the earlier handlers at its end."""
    stop = Stop()
    earlier = {number: signal.signal(number, stop.receive) for number in EXIT_CODES}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def explaining_hard_stops(stop: Stop, checkpoint: Path) -> Iterator[None]:
    """Turn an interrupt that stopped a run at once into an Interrupted that says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, RuntimeError) as error:
        # Ctrl-C on a terminal also reaches the processes that decode images.
        is_dead_worker = stop.is_wanted() and "DataLoader worker" in str(error)
        if isinstance(error, RuntimeError) and not is_dead_worker:
            raise
        way_out = "nothing was saved yet"
        if is_unfinished(checkpoint):
            way_out = "continue from its last checkpoint with --resume"
        raise Interrupted(f"stopped at once; {way_out}", stop.exit_code) from None

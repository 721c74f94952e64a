"""metrics.jsonl, and the events that pruning and dense training have in common."""

import contextlib
import json
import os
from pathlib import Path

from dpm_cli.errors import RunError
from dpm_cli.report import Event


class Metrics:
    """The file: one object a line, flushed as it happens; cut back to the checkpoint on resume."""

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._start = path, start

    def __enter__(self) -> "Metrics":
        try:
            self._file = self._path.open("a" if self._start else "w", encoding="utf-8")
            self._file.truncate(min(self._start, self._path.stat().st_size))
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error.strerror or error}") from None
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take was reported when it was written
            self._file.close()

    def write(self, event: Event) -> Event:
        try:
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error.strerror or error}") from None
        return event

    def flush_to_disk(self) -> int:
        """Call before the checkpoint that counts on it. Returns the bytes written."""
        try:
            os.fsync(self._file.fileno())
            return self._path.stat().st_size
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error.strerror or error}") from None


class Unwritten(Metrics):
    """In a process that writes no files."""

    def __init__(self) -> None:
        """Needs no path."""

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to close."""

    def write(self, event: Event) -> Event:
        return event


def epoch_event(
    *,
    stage: str,
    epoch: int,
    epochs: int,
    step: int,
    loss: float,
    validation_accuracy: float | None,
    lr: float,
    images: int,
    seconds: float,
    waited: float,
) -> Event:
    """What an epoch was like. lr: of its last step. images: trained on in `seconds`; of these it `waited` for data."""
    return {
        "event": "epoch",
        "stage": stage,
        "epoch": epoch,
        "epochs": epochs,
        "step": step,
        "loss": loss,
        "validation_accuracy": validation_accuracy,
        "lr": lr,
        "images_per_second": images / max(seconds, 1e-9),
        "waiting_for_data": min(waited / max(seconds, 1e-9), 1.0),
        "seconds": seconds,
    }


def step_event(*, stage: str, step: int, steps: int, steps_per_epoch: int) -> Event:
    """That a step was taken. step: how many of the stage's `steps` are done."""
    return {
        "event": "step",
        "stage": stage,
        "step": step,
        "steps": steps,
        "epoch": (step - 1) // steps_per_epoch + 1,
        "epochs": steps // steps_per_epoch,
    }

"""Measure how long training waits for its data."""

import time
from collections.abc import Iterator

from dpm_cli.data.splits import Batch


class Waiting:
    """Counts the seconds that a loop waits for its next batch to be decoded and augmented, but not for the device."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on and count the seconds until each arrives."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self.seconds += time.monotonic() - started
            if batch is None:
                return
            yield batch

    def take(self) -> float:
        """Return the seconds since the last call, for instance of an epoch."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

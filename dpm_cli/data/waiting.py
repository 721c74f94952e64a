"""How long training waits for its data."""

import time
from collections.abc import Iterator

from dpm_cli.data.splits import Batch


class Waiting:
    """Seconds that a loop spends until its next batch is there, decoded and augmented. The device is not waited for."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self.seconds += time.monotonic() - started
            if batch is None:
                return
            yield batch

    def take(self) -> float:
        """The seconds since the last call, for instance of an epoch."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

"""Write metrics.jsonl: one event per line, as it happens; truncated to the checkpoint on resume."""

import contextlib
import json
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, TypeVar, cast

from dpm_cli.errors import RunError
from dpm_cli.events import Event
from dpm_cli.files import NO_LINK

T = TypeVar("T")


class Journal:
    """Logs the events that describe the model. Without a path, as outside the main process, it writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.bytes = 0  # valid length; anything beyond was written after the last checkpoint
        self._file: IO[str] | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the file to append after the valid bytes. Raises RunError if it cannot be written."""
        if self.path is None:
            yield
            return
        with self._explaining():
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINK, 0o666)
            file = os.fdopen(descriptor, "a", encoding="utf-8")
            file.truncate(min(self.bytes, os.fstat(descriptor).st_size))
        self._file = file
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a full disk was already reported by the failed write
                file.close()

    def follow(self, events: Generator[Event, None, T]) -> Generator[Event, None, T]:
        """Pass on events and result, and log the events."""
        try:
            while True:
                event = next(events)
                self.write(event)
                yield event
        except StopIteration as end:
            return cast(T, end.value)
        finally:
            events.close()

    def write(self, event: Event) -> None:
        if event.is_logged and self._file:
            with self._explaining():
                self._file.write(json.dumps(event.to_dict()) + "\n")
                self._file.flush()

    def flush_to_disk(self) -> int:
        """Flush the file. Call before writing a checkpoint. Returns the bytes written."""
        if self.path is None or self._file is None:
            return 0
        with self._explaining():
            os.fsync(self._file.fileno())
            return self.path.stat().st_size

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror or error}") from None

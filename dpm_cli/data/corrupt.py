"""Count images that cannot be read, and leave them out up to a limit."""

from collections.abc import Iterable

from dpm_cli.errors import DataError, listing

SHOWN = 5  # images named in a note


class Corrupt:
    """The unreadable images of a dataset, in the order they were met. At most `limit` are left out."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._paths: dict[str, None] = {}  # in the order in which they were met; an epoch meets them again

    def __len__(self) -> int:
        return len(self._paths)

    def add_(self, path: str, error: DataError) -> None:
        """Count an image. Raises DataError if it exceeds the limit."""
        self._paths[path] = None
        if len(self) <= self.limit:
            return
        if not self.limit:
            raise DataError(f"{error}, or let some be left out with data.max_corrupt")
        raise DataError(f"{error}; it is number {len(self)} of that kind, data.max_corrupt is {self.limit}")

    @property
    def paths(self) -> list[str]:
        """Return the images counted so far."""
        return list(self._paths)

    def adopt_(self, paths: Iterable[str]) -> None:
        """Count images that another process met. Raises DataError if they exceed the limit."""
        self._paths |= dict.fromkeys(paths)
        if len(self) > self.limit:
            raise DataError(f"{self.note}; data.max_corrupt is {self.limit}: repair or remove them, or raise it")

    @property
    def note(self) -> str:
        """Say in one sentence which images are left out."""
        paths = self.paths
        plural = "images are" if len(paths) > 1 else "image is"
        return f"{len(paths)} {plural} unreadable and left out: {listing(paths, SHOWN)}"

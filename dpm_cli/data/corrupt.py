"""Images that cannot be read: named, counted, and left out up to a limit."""

from collections.abc import Iterable

from dpm_cli.errors import DataError, listing

SHOWN = 5  # that are named in a note


class Corrupt:
    """The unreadable images of a dataset, as they are met. At most `limit` are left out."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._paths: dict[str, None] = {}  # in the order in which they were met; an epoch meets them again

    def __len__(self) -> int:
        return len(self._paths)

    def add_(self, path: str, error: DataError) -> None:
        """Count an image. Raises DataError if it is one too many."""
        self._paths[path] = None
        if len(self) <= self.limit:
            return
        if not self.limit:
            raise DataError(f"{error}, or let some be left out with data.max_corrupt")
        raise DataError(f"{error}; it is number {len(self)} of that kind, data.max_corrupt is {self.limit}")

    @property
    def paths(self) -> list[str]:
        return list(self._paths)

    def adopt_(self, paths: Iterable[str]) -> None:
        """Count those that another process met. Raises DataError if they are too many."""
        self._paths |= dict.fromkeys(paths)
        if len(self) > self.limit:
            raise DataError(f"{self.note}; data.max_corrupt is {self.limit}: repair or remove them, or raise it")

    @property
    def note(self) -> str:
        """One sentence for the user."""
        paths = self.paths
        plural = "images are" if len(paths) > 1 else "image is"
        return f"{len(paths)} {plural} unreadable and left out: {listing(paths, SHOWN)}"

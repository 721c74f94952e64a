"""Look at images without decoding them: classes, counts and sizes, to write a recipe by."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpm_cli.data.listing import TEST_PART, Listing, list_folder
from dpm_cli.data.pictures import open_header
from dpm_cli.data.tables import LINES, list_table
from dpm_cli.errors import DataError
from dpm_cli.recipe.values import DATASETS

OPENED = 200  # images whose size is read
TABLES = (".csv", ".tsv", *LINES)


@dataclass(frozen=True)
class Look:
    """Says what a dataset holds. Sizes are the medians of some images, in pixels."""

    name: str  # as data.name
    root: str | None  # as data.root, as the user wrote it
    classes: tuple[str, ...]
    counts: tuple[int, ...]  # images per class, for training and testing together; empty for a known dataset
    images: int  # to train on, before any are held out for validation
    channels: int
    height: int
    width: int

    @property
    def side(self) -> int:
        return min(self.height, self.width)


KNOWN = {  # images to train on, classes, channels, side
    "digits": (1442, 10, 1, 8),
    "cifar10": (50_000, 10, 3, 32),
    "cifar100": (50_000, 100, 3, 32),
    "fashion-mnist": (60_000, 10, 1, 28),
}


def look_at(data: str) -> Look:
    """Look at a folder of class folders, a table of images, or a dataset known by name. Raises DataError."""
    path = Path(data).expanduser()
    if path.is_dir():
        return _look_at_files("folder", data, *list_folder(path, None))
    if path.is_file() and path.suffix in TABLES:
        return _look_at_files("csv", data, *list_table(path, None, labels=True))
    if data in KNOWN:
        images, classes, channels, side = KNOWN[data]
        return Look(data, None, tuple(map(str, range(classes))), (), images, channels, side, side)
    known = ", ".join(name for name in DATASETS if name in KNOWN)
    raise DataError(
        f"{data} is no folder, no CSV or JSON lines file and no known dataset ({known}); other data need a recipe, "
        "in which data.name says where they come from"
    )


def _look_at_files(name: str, data: str, train: Listing, test: Listing | None, classes: tuple[str, ...]) -> Look:
    if len(classes) < 2:
        raise DataError(f"{data} has one class ({', '.join(classes)}); at least two are needed to tell apart")
    entries = train.entries + (test.entries if test else ())
    counts = tuple(sum(entry.label == label for entry in entries) for label in range(len(classes)))
    pictures = _open_some(train.paths)
    if not pictures:
        raise DataError(f"none of the images of {data} can be read, {train.paths[0]} for one")
    channels = 1 if all(mode in ("1", "L") for mode, _, _ in pictures) else 3
    height, width = (round(statistics.median(sizes)) for sizes in list(zip(*pictures))[1:])
    held_out = 0 if test else sum(max(1, count // TEST_PART) for count in counts)
    return Look(name, data, classes, counts, len(train) - held_out, channels, height, width)


def _open_some(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Read mode, height and width of some images, evenly spread, from their headers."""
    found = []
    for path in paths[:: max(1, len(paths) // OPENED)]:
        try:
            with open_header(path) as (image, _):
                found.append((image.mode, image.height, image.width))
        except Exception:  # damaged files make PIL raise nearly anything; the run will name them
            continue
    return found

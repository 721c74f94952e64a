"""List the files and labels of an image folder in an order that is the same everywhere."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpm_cli.errors import DataError, flatten, listing
from dpm_cli.layers.images import Framing

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LAYOUT = "<class>/*.jpg"
TEST_PART = 10  # without test images, every tenth of each class


@dataclass(frozen=True, slots=True)
class Entry:
    """One image file. `size` in bytes and `modified` in nanoseconds tell a changed file from the old one."""

    name: str  # relative to the listing's folder, with forward slashes; from a table it may be absolute
    label: int
    size: int
    modified: int


@dataclass(frozen=True)
class Listing:
    """The image files of one split, sorted by class and name."""

    folder: Path
    entries: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(os.path.join(self.folder, entry.name) for entry in self.entries)  # names may be absolute

    @property
    def labels(self) -> Tensor:
        return torch.tensor([entry.label for entry in self.entries], dtype=torch.int64)  # (N,)

    @property
    def encoded_bytes(self) -> int:
        return sum(entry.size for entry in self.entries)

    def select(self, index: Tensor) -> "Listing":
        """Select the files of `index` (M,), in that order."""
        return Listing(self.folder, tuple(self.entries[i] for i in index.tolist()))

    def digest(self) -> str:
        """Describe the images by number and a digest of names, sizes and labels, which survives copying the folder."""
        text = hashlib.sha256()
        for entry in self.entries:
            text.update(repr((entry.name, entry.size, entry.label)).encode())
        return f"{len(self)} images, {text.hexdigest()[:16]}"

    def fingerprint(self, framing: Framing) -> str:
        """Return a key that changes with any file's name, size or time, with the folder and with what is decoded."""
        text = hashlib.blake2b(repr((2, str(self.folder.resolve()), framing)).encode(), digest_size=16)
        for entry in self.entries:
            text.update(repr((entry.name, entry.size, entry.modified)).encode())
        return text.hexdigest()


def list_folder(root: Path, classes: int | None) -> tuple[Listing, Listing | None, tuple[str, ...]]:
    """Return training images, test images or None, and class names of `root`. classes: their number, if it is known.

    Layouts: `root/train/<class>/*` with `root/test/<class>/*` (or `val`), or `root/<class>/*` alone.
    Raises DataError that names the folder and the layout, or the classes that do not fit.
    """
    try:
        return _list_layout(root, classes)
    except OSError as error:
        raise DataError(f"data.root {root} cannot be read: {error}; repair it or its permissions") from None


def _list_layout(root: Path, classes: int | None) -> tuple[Listing, Listing | None, tuple[str, ...]]:
    layout = f"expected {root}/train/{LAYOUT} and {root}/test/{LAYOUT}"
    if not root.is_dir():
        raise DataError(f"data.root {root} is not a folder; {layout}")
    train = root / "train" if (root / "train").is_dir() else root
    names = _class_folders(train)
    if not names:
        raise DataError(f"{train} has no class folders; {layout}")
    if classes is not None and len(names) != classes:
        shown = listing(names, shown=5)
        raise DataError(f"{train} has {len(names)} class folders ({shown}) but model.classes is {classes}")
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None) if train != root else None
    if test is None:
        return _list_split(train, names), None, names
    if (found := _class_folders(test)) != names:
        odd = sorted(set(found) ^ set(names))
        raise DataError(f"the class folders of {test} differ from those of {train}: {listing(odd, shown=5)}")
    for left, right in [(train, test), *((train / name, test / name) for name in names)]:
        if left.samefile(right):
            raise DataError(f"{right} leads to {left}: testing on the training images would tell nothing; repair it")
    return _list_split(train, names), _list_split(test, names), names


def list_unlabelled(root: Path) -> Listing:
    """List all images below `root/train` if there is such a folder, else below `root`; their labels mean nothing.

    Raises DataError if there are none.
    """
    folder = root / "train" if (root / "train").is_dir() else root
    try:
        entries = sorted(_walk(folder, "", 0), key=lambda entry: entry.name) if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"data.root {root} cannot be read: {error}; repair it or its permissions") from None
    if not entries:
        raise DataError(f"data.root {root} holds no images; known endings: {' '.join(EXTENSIONS)}")
    return Listing(folder, tuple(entries))


def hold_out_test(files: Listing) -> tuple[Listing, Listing]:
    """Split off a tenth of each class as test images, the same for every seed.

    Otherwise a model trained with one seed would meet its training images when tested with another. The names are
    hashed, so that new files move few of the old ones. Raises DataError for a class of one image.
    """
    names = [os.fsencode(entry.name) for entry in files.entries]
    is_held = choose_tests([entry.label for entry in files.entries], names, files.paths)
    return files.select((~is_held).nonzero()[:, 0]), files.select(is_held.nonzero()[:, 0])


def choose_tests(labels: Sequence[int], keys: Sequence[bytes], places: Sequence[str]) -> Tensor:
    """Choose (N,) a tenth of each class by a hash of the keys. places: what to call an image in messages."""
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    held: set[int] = set()
    for members in by_class.values():
        if len(members) == 1:
            place = places[members[0]]
            raise DataError(f"{place} is the only image of its class, so none is left to test on; add more")
        members.sort(key=lambda index: hashlib.blake2b(keys[index]).digest())
        held.update(members[: max(1, len(members) // TEST_PART)])
    return torch.tensor([index in held for index in range(len(labels))])


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _list_split(folder: Path, names: Sequence[str]) -> Listing:
    """List the images of all class folders. Raises DataError for a class without images."""
    entries: list[Entry] = []
    for label, name in enumerate(names):
        found = sorted(_walk(folder / name, name, label), key=lambda entry: entry.name)
        if not found:
            raise DataError(f"class folder {folder / name} has no images; known endings: {' '.join(EXTENSIONS)}")
        entries += found
    return Listing(folder, tuple(entries))


def _walk(folder: Path, prefix: str, label: int) -> Iterator[Entry]:
    """Yield the image files below `folder`, without hidden ones such as macOS leaves behind.

    Raises DataError for a link that leads back to a folder around it.
    """
    rest: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(folder), prefix, frozenset())]
    while rest:  # a stack of our own, because folders may be thousands deep
        place, prefix, around = rest.pop()
        status = os.stat(place)
        here = (status.st_dev, status.st_ino)
        if here in around:
            raise DataError(f"{flatten(place)} leads back to a folder around it: remove that link")
        with os.scandir(place) as items:
            for item in items:
                name = f"{prefix}/{item.name}" if prefix else item.name
                if item.name.startswith("."):
                    continue
                if item.is_dir():
                    rest.append((item.path, name, around | {here}))
                elif item.name.lower().endswith(EXTENSIONS):
                    status = item.stat()
                    yield Entry(name, label, status.st_size, status.st_mtime_ns)

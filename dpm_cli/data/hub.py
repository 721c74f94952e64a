"""Read Hugging Face datasets (extra `hf`), by name or from local files; images are decoded when they are needed."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpm_cli.errors import DataError, listing, one_line

PREFIX = "hf:"
LOCAL = ("imagefolder", "parquet", "arrow", "webdataset")  # builders of the library that read files in data.root
TEST = ("test", "validation", "val", "valid")


@dataclass(frozen=True)
class Rows:
    """One split of a Hugging Face dataset; `dataset[i][column]` is an image file: its bytes, or else its path.

    The library itself would let Pillow open any format, some of them by other programs.
    """

    dataset: Any
    column: str
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> "Rows":
        """Select the images of `index` (M,), in that order."""
        return replace(self, dataset=self.dataset.select(index.tolist()), labels=self.labels[index])

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file = self.dataset[index][self.column]
        return file["bytes"] or file["path"], int(self.labels[index])


def read_hub(name: str, root: Path, *, download: bool, labels: bool) -> tuple[Rows, Rows | None, tuple[str, ...]]:
    """Return training rows, test rows or None, and class names.

    name: hf:NAME of the hub, or hf:imagefolder, hf:parquet and the like for local files in `root`. Raises DataError.
    """
    found = _load(name, root, download=download)
    if "train" not in found:
        raise DataError(f"data.name {name} has the splits {', '.join(map(str, found))}, but none is called train")
    test = next((found[split] for split in TEST if split in found), None)
    train, names = _take_columns(found["train"], name, None, labels=labels)
    return train, None if test is None else _take_columns(test, name, names, labels=labels)[0], names


def _load(name: str, root: Path, *, download: bool) -> Mapping[str, Any]:
    """Call `load_dataset`, quietly. Raises DataError."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"data.name {name} needs the datasets library: pip install 'dpm-cli[hf]'") from None
    builder = name.removeprefix(PREFIX)
    settings: dict[str, Any] = {}
    if builder in LOCAL:
        if not root.is_dir():
            raise DataError(f"data.root {root} is not a folder; {name} reads the files in it")
        settings["data_dir"] = str(root)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(io.StringIO()), _offline(datasets.config, wanted=not download):
            found: Mapping[str, Any] = datasets.load_dataset(builder, **settings)
    except Exception as error:  # of its files, its network code or its builders
        place = f"from {root}" if builder in LOCAL else "from the hub or its cache"
        raise DataError(
            f"data.name {name} cannot be loaded {place} ({one_line(error)}); local files are read by "
            f"{', '.join(PREFIX + each for each in LOCAL[:2])} with data.root"
        ) from None
    return found


@contextlib.contextmanager
def _offline(config: Any, *, wanted: bool) -> Iterator[None]:
    """Temporarily forbid the library to ask the network."""
    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _take_columns(
    dataset: Any, name: str, names: tuple[str, ...] | None, *, labels: bool
) -> tuple[Rows, tuple[str, ...]]:
    """Find the column of images and that of labels. names: of the classes, if another split has told them."""
    import datasets

    features = dataset.features
    column = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise DataError(f"data.name {name} has the columns {listing(features, 8)}, but none holds images")
    dataset = dataset.cast_column(column, datasets.Image(decode=False))
    if not labels:
        return Rows(dataset, column, torch.zeros(len(dataset), dtype=torch.int64)), ()
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    label = label or next((key for key in ("label", "labels", "class") if key in features), None)
    if label is None:
        raise DataError(f"data.name {name} has the columns {listing(features, 8)}, but none is called label")
    values = list(dataset[label])
    if isinstance(features[label], datasets.ClassLabel):
        names = tuple(features[label].names)
    elif names is None:
        by_number = all(isinstance(value, int) for value in values)
        names = tuple(map(str, range(max(values) + 1) if by_number else sorted(set(map(str, values)))))
    place = {each: index for index, each in enumerate(names)}
    numbers = [value if isinstance(value, int) else place.get(str(value), -1) for value in values]
    return Rows(dataset, column, torch.tensor(numbers, dtype=torch.int64)), names

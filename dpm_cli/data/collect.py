"""Take images from Python objects: torch datasets, iterables of (image, label), or rows of Hugging Face datasets."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dpm_cli.data.arrays import Arrays
from dpm_cli.data.decode import Pixels, frame_image
from dpm_cli.data.pictures import MODES, open_image
from dpm_cli.errors import DataError, one_line
from dpm_cli.layers.images import Framing

EXPECTED = (
    "expected a torch dataset or an iterable of (image, label), or a pair or a mapping of such for train and test; "
    "an image is a path, a PIL image, an array (H, W, C) or a tensor (C, H, W) of uint8, or of floats in [0, 1]"
)
TEST = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class Parts:
    """Training images, test images if there are some, and names of the classes if they are known."""

    train: Any  # something with images to visit
    test: Any | None
    names: tuple[str, ...] | None


def find_parts(made: object, what: str) -> Parts:
    """Find the splits in what a function returned. Raises DataError for anything else."""
    train, test = made, None
    if isinstance(made, Mapping):
        train, test = made.get("train"), next((made[name] for name in TEST if name in made), None)
    elif isinstance(made, tuple) and len(made) == 2:  # a list would hold samples
        train, test = made
    if not _is_samples(train) or not (test is None or _is_samples(test)):
        raise DataError(f"{what} returned a {type(made).__name__}; {EXPECTED}")
    names = getattr(train, "classes", None)
    return Parts(train, test, tuple(map(str, names)) if isinstance(names, list | tuple) else None)


def collect(samples: Any, framing: Framing, *, what: str, labels: bool, most: int) -> "Collected":
    """Bring all images to the input's size. Raises DataError that names the first sample that cannot be used.

    labels: false if samples may be images alone. most: number of images that memory holds, where endless iterables end.
    """
    pixels, found = [], []
    for index, sample in enumerate(_iterate(samples, what)):
        if index >= most:
            raise DataError(
                f"{what} gives more than the {most} images that data.memory_limit holds: raise it, or list files in a "
                "CSV (data.name: csv), which are streamed"
            )
        image, label = _take_apart(sample, f"image {index} of {what}", labels=labels)
        try:
            pixels.append(_to_pixels(image, framing, f"image {index} of {what}"))
        except DataError:
            raise
        except Exception as error:  # foreign objects may raise anything
            raise DataError(f"image {index} of {what} cannot be used ({one_line(error)}); {EXPECTED}") from None
        found.append(label)
    stacked = np.stack(pixels) if pixels else np.empty((0, *framing.shape), np.uint8)
    return Collected(torch.from_numpy(stacked), found)


@dataclass(frozen=True)
class Collected:
    """Images at the input's size, and their labels as they were given."""

    pixels: Tensor  # (N, C, H, W) uint8
    labels: list[object]

    def number(self, names: Sequence[str] | None) -> Arrays:
        """Turn labels into numbers by the class names; numbers stay as they are."""
        place = {name: index for index, name in enumerate(names or ())}
        numbers = [label if isinstance(label, int) else place.get(str(label), -1) for label in self.labels]
        return Arrays(self.pixels, torch.tensor(numbers, dtype=torch.int64))

    def name_classes(self) -> tuple[str, ...]:
        """Name the classes by the labels that occur: by number up to the largest, else the sorted texts."""
        if all(isinstance(label, int) for label in self.labels):
            return tuple(
                str(number) for number in range(max((int(str(label)) for label in self.labels), default=-1) + 1)
            )
        return tuple(sorted({str(label) for label in self.labels}))


def _is_samples(made: object) -> bool:
    is_iterable = isinstance(made, Iterable) and not isinstance(made, str | bytes | Tensor | np.ndarray | Mapping)
    return is_iterable or isinstance(made, Dataset) or (hasattr(made, "__getitem__") and hasattr(made, "__len__"))


def _iterate(samples: Any, what: str) -> Iterator[Any]:
    """Visit a torch dataset by index, which has no end of its own, and anything else as an iterable."""
    try:
        if hasattr(samples, "__getitem__") and hasattr(samples, "__len__"):
            yield from (samples[index] for index in range(len(samples)))
        else:
            yield from samples
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"{what} failed while it gave images: {one_line(error)}") from None


def _take_apart(sample: Any, what: str, *, labels: bool) -> tuple[Any, object]:
    """Return the image and the label of one sample; a label is an int or a text."""
    if isinstance(sample, tuple | list) and len(sample) == 2:
        image, label = sample
    elif not labels and not isinstance(sample, tuple | list | Mapping):
        image, label = sample, 0
    else:
        raise DataError(f"{what} is a {type(sample).__name__}; {EXPECTED}")
    label = _to_plain(label)
    if not labels:
        return image, 0
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise DataError(f"{what} has a {type(label).__name__} as label; an int or the name of a class is expected")
    return image, label


def _to_plain(label: Any) -> Any:
    """Turn a scalar of torch or numpy into one of Python."""
    if isinstance(label, Tensor | np.ndarray | np.generic) and math.prod(label.shape) == 1:
        return label.item()
    return label


def _to_pixels(image: Any, framing: Framing, name: str) -> Pixels:
    """Bring one image of any kind to (C, H, W) uint8. Raises DataError, or anything else that its kind raises."""
    channels = framing.shape[0]
    if isinstance(image, str | Path):
        picture = open_image(str(image), channels)
    elif isinstance(image, bytes):
        picture = open_image(image, channels, name=name)
    else:
        picture = (image if isinstance(image, Image.Image) else _to_picture(image)).convert(MODES[channels])
    pixels: Pixels = np.asarray(frame_image(picture, framing))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _to_picture(image: Any) -> Image.Image:
    """Turn a tensor (C, H, W) or an array (H, W, C), grey or RGB, of uint8 or of floats in [0, 1] into a picture."""
    values = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if isinstance(image, Tensor) and values.ndim == 3:
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise DataError(
                f"an image has values from {values.min():g} to {values.max():g}; {EXPECTED}, not normalised"
            )
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8 or values.ndim not in (2, 3):
        raise DataError(f"an image is of {values.dtype} with shape {list(values.shape)}; {EXPECTED}")
    return Image.fromarray(values)

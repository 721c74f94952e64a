"""Decode image files to uint8 arrays, in worker processes if that pays."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpm_cli.data.augment import find_boxes
from dpm_cli.data.corrupt import Corrupt
from dpm_cli.data.pictures import open_image
from dpm_cli.errors import DataError
from dpm_cli.layers.images import Framing

Pixels = NDArray[np.uint8]

WORTH_WORKERS = 16 << 20  # bytes of image files; below, starting processes takes longer than decoding
LONGEST = 64  # times its short side
CHUNK = 256  # images that a worker hands over at once


def frame_image(image: Image.Image, framing: Framing) -> Image.Image:
    """Bring a picture to the size of a model's input. With `resize`, pixel for pixel what torchvision does."""
    _, height, width = framing.shape
    if framing.resize is not None:
        image = _scale_short_side(image, framing.resize)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))
    if image.size == (width, height):
        return image
    if framing.crop == "none":
        return image.resize((width, height), Image.Resampling.BILINEAR)
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def _scale_short_side(image: Image.Image, pixels: int) -> Image.Image:
    short = min(image.size)
    if max(image.size) > LONGEST * short:  # only the centre is wanted, and a line of pixels would fill the memory
        image = ImageOps.fit(image, (min(image.width, LONGEST * short), min(image.height, LONGEST * short)))
    long = int(pixels * max(image.size) / short)
    size = (pixels, long) if image.width <= image.height else (long, pixels)
    return image.resize(size, Image.Resampling.BILINEAR)


def decode(path: str, framing: Framing, box: Tensor | None = None) -> Pixels:
    """Decode an image file to (C, H, W): bring it to the input's size, or cut out what `box` draws.

    `box` (4,) holds the draws of a resized crop; it is cut from the full size, so no detail is lost before.
    """
    channels, height, width = framing.shape
    image = open_image(path, channels)
    if box is not None:
        top, left, tall, wide = find_boxes(box[None], image.height, image.width)[0].tolist()
        # float32 may reach over the border by a rounding error, which PIL refuses
        part = (left, top, min(left + wide, image.width), min(top + tall, image.height))
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=part)
    else:
        image = frame_image(image, framing)
    pixels: Pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def decode_batches(
    paths: Sequence[str],
    framing: Framing,
    batches: list[list[int]],
    *,
    workers: int,
    corrupt: Corrupt,
    boxes: Tensor | None = None,
) -> Iterator[tuple[Pixels, list[int]]]:
    """Decode batches of indexes in `workers` processes.

    Yields the readable images of each batch, (B, C, H, W), and their indexes.

    `boxes` (N, 4) are the draws of resized crops, one per path. Raises DataError naming a file that cannot be read, if
    `corrupt` has reached its limit. If a worker dies, torch raises a RuntimeError anywhere in this process.
    """
    loader: DataLoader[Any] = DataLoader(
        _Files(paths, framing, boxes),
        batch_sampler=batches,
        num_workers=min(workers, _count_cores(), len(batches)),
        collate_fn=_stack,
        generator=torch.Generator(),  # else it draws from the global one, and a resumed run would differ
        worker_init_fn=_leave_signals_to_the_run,
    )
    for batch, (pixels, errors) in zip(batches, loader):
        for place, error in errors.items():
            corrupt.add_(paths[batch[place]], error)
        yield pixels, [index for place, index in enumerate(batch) if place not in errors]


def decode_all(
    paths: Sequence[str],
    framing: Framing,
    *,
    workers: int,
    encoded_bytes: int,
    corrupt: Corrupt,
    tell: Callable[[int, int], None],
) -> tuple[Pixels, list[int]]:
    """Decode all readable files to (N, C, H, W), and return their indexes too.

    encoded_bytes: of all files together. tell: called with the numbers of decoded and of all files now and then. Raises
    DataError naming a file that cannot be read, if `corrupt` has reached its limit.
    """
    pixels = np.empty((len(paths), *framing.shape), dtype=np.uint8)
    chunks = [list(range(first, min(first + CHUNK, len(paths)))) for first in range(0, len(paths), CHUNK)]
    workers = workers if encoded_bytes >= WORTH_WORKERS else 0
    kept: list[int] = []
    decoding = decode_batches(paths, framing, chunks, workers=workers, corrupt=corrupt)
    for chunk, (decoded, indexes) in zip(chunks, decoding):
        pixels[len(kept) : len(kept) + len(indexes)] = decoded
        kept += indexes
        tell(chunk[-1] + 1, len(paths))
    return pixels[: len(kept)], kept


def _leave_signals_to_the_run(worker: int) -> None:
    """Ignore Ctrl-C, which reaches all processes: the run needs its workers until its checkpoint is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Files(Dataset[Pixels | DataError]):
    """Image files by index. Errors are returned, because torch would wrap a raised one in a worker's traceback."""

    def __init__(self, paths: Sequence[str], framing: Framing, boxes: Tensor | None) -> None:
        self.paths, self.framing, self.boxes = paths, framing, boxes

    def __getitem__(self, index: int) -> Pixels | DataError:
        try:
            return decode(self.paths[index], self.framing, None if self.boxes is None else self.boxes[index])
        except DataError as error:
            return error


def _count_cores() -> int:
    """Count the cores that this process may use; more decoding processes gain nothing."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stack(images: list[Pixels | DataError]) -> tuple[Pixels, dict[int, DataError]]:
    """Stack the images that could be read, (B, C, H, W), and return the errors of the others by place.

    An array, not a tensor: tensors travel through /dev/shm, which is too small in many containers.
    """
    good = [image for image in images if not isinstance(image, DataError)]
    errors = {place: image for place, image in enumerate(images) if isinstance(image, DataError)}
    return np.stack(good) if good else np.empty((0, 0, 0, 0), np.uint8), errors

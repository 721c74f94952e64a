"""Load a dataset by name and split it for training, validation and test."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dpm_cli.data import digits
from dpm_cli.data.arrays import Arrays
from dpm_cli.data.cache import cache, find_cached
from dpm_cli.data.collect import collect
from dpm_cli.data.corrupt import Corrupt
from dpm_cli.data.decode import decode_all
from dpm_cli.data.downloads import KNOWN
from dpm_cli.data.fit import check_shape, check_statistics, fit_pixels, fit_statistics
from dpm_cli.data.hub import Rows
from dpm_cli.data.listing import Listing
from dpm_cli.data.randomness import generator
from dpm_cli.data.sources import Part, find_source
from dpm_cli.data.splits import Images, Splits
from dpm_cli.data.streamed import Streamed
from dpm_cli.errors import DataError
from dpm_cli.layers.images import Framing, Shape
from dpm_cli.recipe.sections import Data

Tell = Callable[[str, int, int], None]  # (split, decoded files, all files)

STATISTICS = {  # mean and std of pixels in [0, 1]
    "digits": (digits.MEAN, digits.STD),
    **{name: (known.mean, known.std) for name, known in KNOWN.items()},
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of all other images: what pretrained models expect


def load_data(
    data: Data,
    *,
    shape: Shape,
    classes: int,
    seed: int,
    device: torch.device | str = "cpu",
    tell: Tell = lambda split, decoded, files: None,
) -> Splits:
    """Load the images that `data.name` names, fitted to a model's input `shape`.

    seed: chooses the images that are held out for validation, and those kept if there is a limit; the test images never
    depend on it. Images are kept as uint8 on the device; files larger than `data.memory_limit` are streamed. Without
    labels a folder needs no class folders, and its test split is empty. `data.resize` and `data.crop`: see `Framing`.
    tell: called while files are decoded into memory.
    Raises DataError for data that is absent, damaged, too large, or does not fit `shape` and `classes`.

        splits = load_data(Data(name="digits"), shape=(1, 8, 8), classes=10, seed=0)
    """
    mean, std = _choose_statistics(data, shape)
    framing = _frame(data, shape)
    source = find_source(data, framing, classes)
    chosen = source.train.select(choose(len(source.train), data.limit, seed))
    is_streamable = isinstance(chosen, Listing)
    fits = _fits_memory(data, len(chosen) + len(source.test), shape, is_streamable=is_streamable)
    corrupt, workers = Corrupt(data.max_corrupt), data.workers
    normalise = torch.tensor(mean), torch.tensor(std)
    train, test = (
        _open(part, framing, *normalise, workers=workers, in_memory=fits, corrupt=corrupt, tell=partial(tell, split))
        for part, split in ((chosen, "training"), (source.test, "test"))
    )
    train_index, validation_index = hold_out(len(train), data.validation, seed)
    device = torch.device(device)
    return Splits(
        train=train.select(train_index).to(device),
        validation=train.select(validation_index).to(device),
        test=test.to(device),
        classes=classes,
        shape=shape,
        names=source.names,
        mean=mean,
        std=std,
        labelled=data.labels,
        test_held_out=source.test_held_out,
        fingerprints={"training images": _digest(train, chosen), "test images": _digest(test, source.test)},
        corrupt=corrupt,
    )


def _choose_statistics(data: Data, shape: Shape) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Take the user's mean and std, else the dataset's own. Raises DataError for what does not fit the shape."""
    check_shape(data.name, shape)
    check_statistics("data.mean", data.mean, shape[0])
    check_statistics("data.std", data.std, shape[0])
    own_mean, own_std = STATISTICS.get(data.name, IMAGENET)
    return (
        fit_statistics(own_mean, shape[0]) if data.mean is None else data.mean,
        fit_statistics(own_std, shape[0]) if data.std is None else data.std,
    )


def _frame(data: Data, shape: Shape) -> Framing:
    """Say how pictures are brought to the size of the input. Raises DataError for a dataset that has no files."""
    framing = Framing(shape, data.resize, data.crop)
    if not framing.is_usual and data.name in (*KNOWN, "digits"):
        raise DataError(f"data.resize and data.crop are for image files; leave them out for {data.name}")
    return framing


def _fits_memory(data: Data, count: int, shape: Shape, *, is_streamable: bool) -> bool:
    """Tell whether all images fit into the memory limit. Raises DataError if not and they cannot be streamed."""
    decoded_bytes = count * math.prod(shape)
    if decoded_bytes > data.memory_limit and not is_streamable:
        raise DataError(
            f"{data.name} at {'x'.join(map(str, shape))} takes {decoded_bytes} bytes; data.memory_limit is "
            f"{data.memory_limit}: raise it, lower data.limit, or use an image folder or a CSV of files, which stream"
        )
    return decoded_bytes <= data.memory_limit


def hold_out(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return sorted indexes of training and validation images; at least one of the latter if `fraction` > 0.

    Raises DataError if none is left to train on.
    """
    held = max(1, round(count * fraction)) if fraction > 0 else 0
    if held >= count:
        raise DataError(f"data.validation {fraction} leaves none of {count} training images to train on; lower it")
    order = torch.randperm(count, generator=generator("validation", seed))
    return order[held:].sort().values, order[:held].sort().values


def choose(count: int, limit: int | None, seed: int) -> Tensor:
    """Choose at most `limit` of `count` images; return their sorted indexes."""
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator("limit", seed))[:limit].sort().values


def _digest(opened: Images | Streamed, part: Part) -> str:
    """Digest the pixels if they are in memory; reading streamed files would take as long as an epoch."""
    if isinstance(opened, Images):
        return opened.digest()
    assert isinstance(part, Listing)
    return part.digest()


def _open(
    part: Part,
    framing: Framing,
    mean: Tensor,
    std: Tensor,
    *,
    workers: int,
    in_memory: bool,
    corrupt: Corrupt,
    tell: Callable[[int, int], None],
) -> Images | Streamed:
    """Fit arrays, stream files, or decode them into memory, from the cache if they were decoded before."""
    if isinstance(part, Arrays):
        return Images(fit_pixels(part.pixels, framing.shape), part.labels, mean, std)
    if isinstance(part, Rows):
        collected = collect(part, framing, what="the dataset", labels=True, most=len(part))
        return Images(collected.pixels, part.labels, mean, std)
    if not in_memory:
        return Streamed(part.paths, part.labels, framing, mean, std, workers, corrupt)
    key = part.fingerprint(framing)
    pixels = find_cached(key, (len(part), *framing.shape))
    if pixels is None:
        pixels, kept = decode_all(
            part.paths, framing, workers=workers, encoded_bytes=part.encoded_bytes, corrupt=corrupt, tell=tell
        )
        if len(kept) == len(part):  # else the next run would not know which are left out
            cache(key, pixels)
        part = part.select(torch.tensor(kept, dtype=torch.int64))
    return Images(torch.from_numpy(pixels), part.labels, mean, std)

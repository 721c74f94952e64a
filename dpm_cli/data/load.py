"""Load a dataset by name and split it for training, validation and test."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpm_cli.data import digits
from dpm_cli.data.arrays import Arrays, check_classes
from dpm_cli.data.cache import cache, find_cached
from dpm_cli.data.corrupt import Corrupt
from dpm_cli.data.decode import decode_all
from dpm_cli.data.downloads import KNOWN, read_known
from dpm_cli.data.fit import check_shape, check_statistics, fit_pixels, fit_statistics
from dpm_cli.data.listing import Listing, hold_out_test, list_folder, list_unlabelled
from dpm_cli.data.randomness import generator
from dpm_cli.data.splits import Images, Splits
from dpm_cli.data.streamed import Streamed
from dpm_cli.errors import DataError
from dpm_cli.layers.images import Crop, Framing, Shape

STATISTICS = {  # mean and std of pixels in [0, 1]
    "digits": (digits.MEAN, digits.STD),
    **{name: (known.mean, known.std) for name, known in KNOWN.items()},
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's, which pretrained models expect
}


def load_data(
    name: str,
    *,
    root: str | Path,
    shape: Shape,
    classes: int,
    validation: float,
    seed: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    memory_limit: int,
    workers: int,
    download: bool,
    limit: int | None,
    device: torch.device | str,
    max_corrupt: int = 0,
    labels: bool = True,
    resize: int | None = None,
    crop: Crop = "center",
) -> Splits:
    """Load digits, cifar10, cifar100, fashion-mnist or an image folder, fitted to a model's input `shape`.

    validation: the fraction of the training images held out by `seed`; 0 gives an empty split. The test images never
    depend on the seed. limit: the number of training images to keep before that. mean, std: replace the dataset's own.
    memory_limit: bytes; images are kept as uint8 on the device, but `workers` processes stream a folder that is larger.
    max_corrupt: the number of unreadable images of a folder to leave out. labels: without them a folder needs no class
    folders, and its test split is empty. resize, crop: how image files are brought to `shape`, see `Framing`.
    Raises DataError for data that is absent, damaged, too large, or does not fit `shape` and `classes`.

        splits = load_data(
            "digits", root="data", shape=(1, 8, 8), classes=10, validation=0.1, seed=0, mean=None, std=None,
            memory_limit=1 << 30, workers=0, download=False, limit=None, device="cpu",
        )
    """
    mean, std = _choose_statistics(name, shape, mean, std)
    framing = _frame(name, shape, resize, crop)
    source = _find(name, Path(root).expanduser(), classes, download, labels)
    chosen = source.train.select(choose(len(source.train), limit, seed))
    fits = _fits_memory(name, len(chosen) + len(source.test), shape, memory_limit)
    corrupt = Corrupt(max_corrupt)
    train, test = (
        _open(part, framing, torch.tensor(mean), torch.tensor(std), workers=workers, in_memory=fits, corrupt=corrupt)
        for part in (chosen, source.test)
    )
    train_index, validation_index = hold_out(len(train), validation, seed)
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
        labelled=labels,
        test_held_out=source.test_held_out,
        fingerprints={"training images": _digest(train, chosen), "test images": _digest(test, source.test)},
        corrupt=corrupt,
    )


def _choose_statistics(
    name: str, shape: Shape, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Take the user's mean and std, else the dataset's own. Raises DataError for what cannot be loaded or used."""
    if name not in STATISTICS:
        raise DataError(f"data.name is {name!r}; known: {', '.join(STATISTICS)}")
    check_shape(name, shape)
    check_statistics("data.mean", mean, shape[0])
    check_statistics("data.std", std, shape[0])
    own_mean, own_std = STATISTICS[name]
    return (
        fit_statistics(own_mean, shape[0]) if mean is None else mean,
        fit_statistics(own_std, shape[0]) if std is None else std,
    )


def _frame(name: str, shape: Shape, resize: int | None, crop: Crop) -> Framing:
    """Say how pictures are brought to the size of the input. Raises DataError for a dataset that has no files."""
    framing = Framing(shape, resize, crop)
    if not framing.is_usual and name in (*KNOWN, "digits"):
        raise DataError(f"data.resize and data.crop are for image files; leave them out for {name}")
    return framing


def _fits_memory(name: str, count: int, shape: Shape, memory_limit: int) -> bool:
    """Tell whether all images fit into `memory_limit` bytes. Raises DataError if not and they cannot be streamed."""
    decoded_bytes = count * math.prod(shape)
    if decoded_bytes > memory_limit and name != "folder":
        raise DataError(
            f"{name} at {'x'.join(map(str, shape))} takes {decoded_bytes} bytes; data.memory_limit is {memory_limit}: "
            "raise it, lower data.limit, or use an image folder, which can be streamed"
        )
    return decoded_bytes <= memory_limit


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


@dataclass(frozen=True)
class _Source:
    """A dataset before anything is held out, resized or decoded."""

    train: Arrays | Listing
    test: Arrays | Listing
    names: tuple[str, ...]
    test_held_out: bool = False


def _find(name: str, root: Path, classes: int, download: bool, labels: bool) -> _Source:
    """Find the dataset of a name. Raises DataError if it is absent or does not have these classes."""
    if name == "folder" and not labels:
        files = list_unlabelled(root)
        return _Source(files, files.select(torch.arange(0)), ())
    if name == "folder":
        files, test_files, names = list_folder(root, classes)
        if test_files is None:
            return _Source(*hold_out_test(files), names, test_held_out=True)
        return _Source(files, test_files, names)
    if name == "digits":
        train, test = digits.read_digits()
        names = tuple("0123456789")
    else:
        train, test, names = read_known(name, root, download=download)
    check_classes(f"{name} (training images)", train, names, classes)
    check_classes(f"{name} (test images)", test, names, classes)
    return _Source(train, test, names)


def _digest(opened: Images | Streamed, part: Arrays | Listing) -> str:
    """Digest the pixels if they are in memory; reading streamed files would take as long as an epoch."""
    if isinstance(opened, Images):
        return opened.digest()
    assert isinstance(part, Listing)
    return part.digest()


def _open(
    part: Arrays | Listing,
    framing: Framing,
    mean: Tensor,
    std: Tensor,
    *,
    workers: int,
    in_memory: bool,
    corrupt: Corrupt,
) -> Images | Streamed:
    """Fit arrays, stream files, or decode them into memory, from the cache if they were decoded before."""
    if isinstance(part, Arrays):
        return Images(fit_pixels(part.pixels, framing.shape), part.labels, mean, std)
    if not in_memory:
        return Streamed(part.paths, part.labels, framing, mean, std, workers, corrupt)
    key = part.fingerprint(framing)
    pixels = find_cached(key, (len(part), *framing.shape))
    if pixels is None:
        pixels, kept = decode_all(
            part.paths, framing, workers=workers, encoded_bytes=part.encoded_bytes, corrupt=corrupt
        )
        if len(kept) == len(part):  # else the next run would not know which are left out
            cache(key, pixels)
        part = part.select(torch.tensor(kept, dtype=torch.int64))
    return Images(torch.from_numpy(pixels), part.labels, mean, std)

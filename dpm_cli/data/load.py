"""A dataset by name -> its training, validation and test splits."""

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
from dpm_cli.layers.images import Shape

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
) -> Splits:
    """Load digits, cifar10, cifar100, fashion-mnist or an image folder, fitted to a model's input `shape`.

    `validation` is the fraction of the training images held out by `seed` (0: an empty split); before that, `limit`
    keeps so many of them. The test images never depend on the seed. Images are kept as uint8 on the device; a folder
    larger than `memory_limit` bytes is streamed by `workers` processes instead. `mean` and `std` replace the dataset's
    own. Of a folder, `max_corrupt` images that cannot be read are left out. `labels` false: they mean nothing, and a
    folder needs no class folders; its test split is empty.
    Raises DataError for data that is absent, damaged, too large, or does not fit `shape` and `classes`.
    """
    if name not in STATISTICS:
        raise DataError(f"data.name is {name!r}; known: {', '.join(STATISTICS)}")
    check_shape(name, shape)
    check_statistics("data.mean", mean, shape[0])
    check_statistics("data.std", std, shape[0])
    own_mean, own_std = STATISTICS[name]
    mean = fit_statistics(own_mean, shape[0]) if mean is None else mean
    std = fit_statistics(own_std, shape[0]) if std is None else std
    source = _find(name, Path(root).expanduser(), classes, download, labels)
    chosen = source.train.select(choose(len(source.train), limit, seed))
    decoded_bytes = (len(chosen) + len(source.test)) * math.prod(shape)
    fits = decoded_bytes <= memory_limit
    if not fits and name != "folder":
        raise DataError(
            f"{name} at {'x'.join(map(str, shape))} takes {decoded_bytes} bytes; data.memory_limit is {memory_limit}: "
            "raise it, lower data.limit, or use an image folder, which can be streamed"
        )
    corrupt = Corrupt(max_corrupt)
    train, test = (
        _open(part, shape, torch.tensor(mean), torch.tensor(std), workers=workers, in_memory=fits, corrupt=corrupt)
        for part in (chosen, source.test)
    )
    train_index, validation_index = hold_out(len(train), validation, seed)
    fingerprints = {
        name: _digest(opened, part)
        for name, opened, part in (("training images", train, chosen), ("test images", test, source.test))
    }
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
        fingerprints=fingerprints,
        corrupt=corrupt,
    )


def hold_out(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indexes of the training and of the validation images; at least one of the latter if `fraction` > 0.

    Raises DataError if none is left to train on.
    """
    held = max(1, round(count * fraction)) if fraction > 0 else 0
    if held >= count:
        raise DataError(f"data.validation {fraction} leaves none of {count} training images to train on; lower it")
    order = torch.randperm(count, generator=generator("validation", seed))
    return order[held:].sort().values, order[:held].sort().values


def choose(count: int, limit: int | None, seed: int) -> Tensor:
    """Sorted indexes of at most `limit` of `count` images."""
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator("limit", seed))[:limit].sort().values


@dataclass(frozen=True)
class _Source:
    """A dataset as it was found, before anything is held out, resized or decoded."""

    train: Arrays | Listing
    test: Arrays | Listing
    names: tuple[str, ...]
    test_held_out: bool = False


def _find(name: str, root: Path, classes: int, download: bool, labels: bool) -> _Source:
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
    """Of the pixels where they are at hand; reading streamed files would take as long as an epoch."""
    if isinstance(opened, Images):
        return opened.digest()
    assert isinstance(part, Listing)
    return part.digest()


def _open(
    part: Arrays | Listing,
    shape: Shape,
    mean: Tensor,
    std: Tensor,
    *,
    workers: int,
    in_memory: bool,
    corrupt: Corrupt,
) -> Images | Streamed:
    if isinstance(part, Arrays):
        return Images(fit_pixels(part.pixels, shape), part.labels, mean, std)
    if not in_memory:
        return Streamed(part.paths, part.labels, shape, mean, std, workers, corrupt)
    key = part.fingerprint(shape)
    pixels = find_cached(key, (len(part), *shape))
    if pixels is None:
        pixels, kept = decode_all(part.paths, shape, workers=workers, encoded_bytes=part.encoded_bytes, corrupt=corrupt)
        if len(kept) == len(part):  # else the next run would not know which are left out
            cache(key, pixels)
        part = part.select(torch.tensor(kept, dtype=torch.int64))
    return Images(torch.from_numpy(pixels), part.labels, mean, std)

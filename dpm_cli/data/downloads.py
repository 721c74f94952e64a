"""Read CIFAR-10, CIFAR-100 and Fashion-MNIST through torchvision, which checks the md5 of what it unpickles."""

import contextlib
import io
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from tarfile import TarError
from typing import Any

import torch
from torchvision import datasets

from dpm_cli.data.arrays import Arrays
from dpm_cli.errors import DataError, flatten

TIMEOUT_SECONDS = 20.0  # until a silent server is given up; Python would wait for ever


# what torchvision raises for absent, unreachable, truncated or foreign files
FAILURES = (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AssertionError, UnpicklingError, TarError)


@dataclass(frozen=True)
class Known:
    """A dataset that torchvision downloads. `mean` and `std` are of its training pixels in [0, 1]."""

    source: Any  # the torchvision class
    files: str  # expected below the root
    mean: tuple[float, ...]
    std: tuple[float, ...]


KNOWN = {
    "cifar10": Known(
        datasets.CIFAR10,
        "cifar-10-batches-py/{data_batch_1 to data_batch_5, test_batch, batches.meta}",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.243, 0.261),
    ),
    "cifar100": Known(
        datasets.CIFAR100,
        "cifar-100-python/{train, test, meta}",
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    ),
    "fashion-mnist": Known(
        datasets.FashionMNIST,
        "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte",
        mean=(0.2860,),
        std=(0.3530,),
    ),
}


def read_known(name: str, root: Path, *, download: bool) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Return training images, test images and class names of a dataset in KNOWN.

    If it is absent from `root`, download it there if that is allowed.
    Raises DataError naming the folder, the files expected there and the way out.
    """
    known = KNOWN[name]
    try:
        with _download_quietly():
            train = known.source(str(root), train=True, download=download)
            test = known.source(str(root), train=False, download=False)
        return _to_arrays(train), _to_arrays(test), tuple(train.classes)
    except FAILURES as error:
        raise _explain(name, root, download, error) from None


def _to_arrays(dataset: Any) -> Arrays:
    pixels, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets, dtype=torch.int64)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)  # channels last on disk
    if len(pixels) != len(labels):
        raise ValueError(f"{len(pixels)} images but {len(labels)} labels")
    return Arrays(pixels, labels)


def _explain(name: str, root: Path, download: bool, error: Exception) -> DataError:
    reason = flatten(str(error).replace(" You can use download=True to download it", ""))
    ways_out = (
        f"copy the files there, {'' if download else 'set data.download: true, '}or set data.root to their folder"
    )
    return DataError(
        f"{name} cannot be loaded from {root} ({reason.rstrip('.')}); expected {root}/{KNOWN[name].files}; {ways_out}"
    )


@contextlib.contextmanager
def _download_quietly() -> Iterator[None]:
    """Show torchvision's progress bar on a terminal only, keep stdout clean, and give up on a silent server."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    bar = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(bar):
            yield
    finally:
        socket.setdefaulttimeout(before)

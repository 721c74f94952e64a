"""Hold the splits of a dataset: images in memory, and the interface they share with streamed ones."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dpm_cli.data.augment import draw_epoch, finish, normalise
from dpm_cli.data.corrupt import Corrupt
from dpm_cli.layers.images import Shape
from dpm_cli.recipe.sections import Augment

Share = tuple[int, int]  # rank, and number of processes that share each batch
Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) float32 normalised, labels (B,) int64; both on the device


class Split(Protocol):
    """A set of labelled images that can be visited in batches."""

    def __len__(self) -> int: ...

    def batches(
        self,
        batch: int,
        *,
        seed: int,
        epoch: int,
        augment: Augment | None,
        start: int = 0,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """Visit every image once, `batch` at a time; the last batch may be smaller unless `drop_last`.

        With `augment=None` images come in order and unchanged, for evaluation. Otherwise (seed, epoch, index) alone
        decide the order and the augmentation. `start` skips that many batches without computing them and without
        changing those that follow.
        Raises DataError, before the first batch, for an augmentation that is too large for the images.
        """
        ...

    def select(self, index: Tensor) -> "Split":
        """Select the images of `index` (M,), a CPU tensor, in that order."""
        ...

    def of_rank(self, rank: int, size: int) -> "Split":
        """Keep only the slice that one of `size` processes gets of each batch; leave empty slices out."""
        ...

    def to(self, device: torch.device) -> "Split":
        """Let batches come on `device`."""
        ...


@dataclass(frozen=True)
class Images:
    """One split in memory, on its device."""

    pixels: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64
    mean: Tensor  # (C,) of pixels in [0, 1]
    std: Tensor  # (C,)
    share: Share = (0, 1)

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(
        self,
        batch: int,
        *,
        seed: int,
        epoch: int,
        augment: Augment | None,
        start: int = 0,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """See `Split.batches`."""
        device = self.pixels.device
        cut = partial(split_order, batch=batch, start=start, drop_last=drop_last, share=self.share)
        if augment is None:
            parts = cut(torch.arange(len(self), device=device))
            return ((normalise(self.pixels[part], self.mean, self.std), self.labels[part]) for part in parts)
        height, width = self.pixels.shape[-2:]
        order, draws = draw_epoch(len(self), augment, height=height, width=width, seed=seed, epoch=epoch)
        draws = draws.to(device)  # once per epoch, so that no step waits for a copy
        parts = cut(order.to(device))
        return (
            (finish(self.pixels[part], draws.of(part), augment, mean=self.mean, std=self.std), self.labels[part])
            for part in parts
        )

    def select(self, index: Tensor) -> "Images":
        index = index.to(self.pixels.device)
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def of_rank(self, rank: int, size: int) -> "Images":
        return replace(self, share=(rank, size))

    def to(self, device: torch.device) -> "Images":
        tensors = {name: getattr(self, name).to(device) for name in ("pixels", "labels", "mean", "std")}
        return replace(self, **tensors)

    def digest(self) -> str:
        """Describe the images by number and a digest of pixels and labels."""
        digest = hashlib.sha256(repr((self.pixels.shape, self.labels.tolist())).encode())
        for first in range(0, len(self), 4096):  # parts, so that no copy of all of them is made
            digest.update(self.pixels[first : first + 4096].cpu().contiguous().numpy().data)
        return f"{len(self)} images, {digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class Splits:
    """A dataset, ready for training and evaluation."""

    train: Split
    validation: Split  # held out of the training images, for every decision; may be empty
    test: Split  # for the last measurement only
    classes: int
    shape: Shape
    names: tuple[str, ...]  # of the classes, by label
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    labelled: bool = True  # false if the labels mean nothing
    test_held_out: bool = False  # the folder has no test images, so a fixed tenth of the training images serves
    corrupt: Corrupt = field(default_factory=Corrupt)  # images left out; streamed ones are found during training
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # by kind of images: their number and a digest


def sample(count: int, most: int, *, seed: int) -> Tensor:
    """Draw the indexes of at most so many of `count` images: the first ones of a folder would be of one class."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most]


def split_order(order: Tensor, batch: int, *, start: int, drop_last: bool, share: Share) -> list[Tensor]:
    """Cut the visiting order (N,) into batches of indexes, from batch `start` on, and take this share of each."""
    end = len(order) // batch * batch if drop_last else len(order)
    batches = (order[first : min(first + batch, end)] for first in range(start * batch, end, batch))
    rank, size = share
    slices = (part[len(part) * rank // size : len(part) * (rank + 1) // size] for part in batches)
    return [part for part in slices if len(part)]

"""Measure accuracy and loss over a whole split, with one device-to-host synchronisation at the end."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpm_cli.engine.distributed import ALONE, World
from dpm_cli.engine.precision import Precision
from dpm_cli.errors import DataError
from dpm_cli.layers.modes import in_mode
from dpm_cli.tasks.classification import main_output


class Split(Protocol):
    """Yields labelled images in batches; `augment=None` means in order and unchanged."""

    def batches(
        self, batch: int, *, seed: int, epoch: int, augment: None
    ) -> Iterator[tuple[Tensor, Tensor]]: ...  # (B, C, H, W) normalised, (B,)


@dataclass(frozen=True)
class Score:
    """Holds the accuracy and loss of a model on a split."""

    accuracy: float  # percent
    loss: float  # mean cross-entropy
    images: int


def evaluate(
    run: Callable[[Tensor], object],
    split: Split,
    *,
    batch: int,
    precision: Precision | None = None,
    world: World = ALONE,
) -> Score:
    """Score anything that maps images (B, C, H, W) to logits; a module must already be in eval mode.

    precision: autocasts forward passes; None leaves them unchanged. world: the processes, each of which was given its
    slice of the split. Raises DataError if the split is empty.
    """
    correct, loss = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.float64)
    images_seen = 0
    with torch.inference_mode(), precision.autocast() if precision else nullcontext():
        for pixels, labels in split.batches(batch, seed=0, epoch=0, augment=None):
            logits = main_output(run(pixels), images=len(pixels)).float()  # (B, classes)
            labels = labels.to(logits.device)  # an exported file may answer on another device
            if not images_seen:
                correct, loss = correct.to(logits.device), loss.to(logits.device)
            correct += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            images_seen += len(labels)
    hits, total, images = world.sum(*torch.stack([correct.double(), loss]).tolist(), images_seen)
    if not images:
        raise DataError("the split to evaluate on holds no images; for validation raise data.validation above 0")
    return Score(accuracy=100 * hits / images, loss=total / images, images=int(images))


def evaluate_module(
    model: nn.Module, split: Split, *, batch: int, precision: Precision | None = None, world: World = ALONE
) -> Score:
    """Score a module in eval mode; every submodule gets its own mode back."""
    with in_mode(model, training=False):
        return evaluate(model, split, batch=batch, precision=precision, world=world)

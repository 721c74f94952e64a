"""Hold what stays fixed during a run: data, device, precision and processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_cli.data import Splits
from dpm_cli.data.splits import Split
from dpm_cli.engine.batchnorm import recalibrate_batchnorm_
from dpm_cli.engine.distributed import ALONE, World
from dpm_cli.engine.evaluate import evaluate_module
from dpm_cli.engine.precision import Precision
from dpm_cli.errors import RecipeError
from dpm_cli.recipe.sections import Data, Engine

CHECK_IMAGES = 8  # real inputs to compare outputs on, before and after compaction
EVALUATED = 8  # batches of training that a GPU evaluates at once


@dataclass(frozen=True)
class Setup:
    """Holds what all stages of a run share."""

    splits: Splits
    data: Data  # how `splits` were loaded, and how they are batched
    seed: int
    checkpoint: Path  # the file to resume from after an interruption
    checkpoint_every: int  # steps
    device: torch.device
    precision: Precision
    engine: Engine = field(default=Engine())
    should_stop: Callable[[], int] = lambda: False  # true, or the exit code to stop with
    world: World = field(default=ALONE)

    def require_enough_images(self) -> None:
        """Check that every process gets an image of each batch. Raises RecipeError."""
        batch, size = self.data.batch, self.world.size
        if size > min(batch, len(self.splits.train)):
            raise RecipeError(f"data.batch is {batch}, less than an image for each of {size} processes")

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.splits.train) // self.data.batch)

    @cached_property
    def _train(self) -> Split:
        """Return this process's slice of the training images."""
        return self.world.slice(self.splits.train)

    @cached_property
    def _validation(self) -> Split:
        return self.world.slice(self.splits.validation)

    def epoch_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield full batches only, unless the images do not fill one. epoch: counted over the whole run."""
        return self._train.batches(
            self.data.batch,
            seed=self.seed,
            epoch=epoch,
            augment=self.data.augment,
            start=start,
            drop_last=len(self._train) >= self.data.batch,
        )

    def stage_batches(self, first_epoch: int, epochs: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training batches of a stage from this step on."""
        per_epoch = self.steps_per_epoch
        for epoch in range(step // per_epoch, epochs):
            yield from self.epoch_batches(first_epoch + epoch, start=max(step - epoch * per_epoch, 0))

    def check_images(self) -> Tensor:
        """Return (B, C, H, W) the first validation images, or training images if there are none."""
        held_out = self.splits.validation if len(self.splits.validation) else self.splits.train
        images, _ = next(held_out.batches(CHECK_IMAGES, seed=0, epoch=0, augment=None))
        return images

    @property
    def _evaluated_at_once(self) -> int:
        """Count the images of a batch without gradients: a GPU has room for more of them, and waits less for Python."""
        return self.data.batch * (EVALUATED if self.device.type == "cuda" else 1)

    def validate(self, model: nn.Module) -> float | None:
        """Measure accuracy in percent on the validation images, for decisions; None if there are none."""
        if not (self.splits.labelled and len(self._validation)):
            return None
        batch, precision = self._evaluated_at_once, self.precision
        return evaluate_module(model, self._validation, batch=batch, precision=precision, world=self.world).accuracy

    def test(self, model: nn.Module) -> float | None:
        """Measure accuracy in percent on the test images, for reports only; None without labels."""
        if not self.splits.labelled:
            return None
        return evaluate_module(model, self.splits.test, batch=self._evaluated_at_once).accuracy

    def recalibrate_(self, model: nn.Module, epoch: int, *, batches: int) -> None:
        """Recompute BatchNorm statistics on training images. epoch: a number that no stage uses."""
        recalibrate_batchnorm_(
            model, self.epoch_batches(epoch), count=batches, precision=self.precision, world=self.world
        )

"""Hold what stays fixed during a run: data, device, precision and processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_cli.data import Augmentation, Splits
from dpm_cli.data.splits import Split
from dpm_cli.engine.batchnorm import recalibrate_batchnorm_
from dpm_cli.engine.distributed import ALONE, World
from dpm_cli.engine.evaluate import evaluate_module
from dpm_cli.engine.precision import Precision
from dpm_cli.errors import RecipeError
from dpm_cli.recipe import Recipe

CHECK_IMAGES = 8  # real inputs to compare outputs on, before and after compaction


@dataclass(frozen=True)
class Setup:
    """Holds what all stages of a run share."""

    recipe: Recipe
    splits: Splits
    checkpoint: Path  # the file to resume from after an interruption
    device: torch.device
    precision: Precision
    should_stop: Callable[[], int] = lambda: False  # true, or the exit code to stop with
    world: World = field(default=ALONE)

    def require_enough_images(self) -> None:
        """Check that every process gets an image of each batch. Raises RecipeError."""
        batch, size = self.recipe.data.batch, self.world.size
        if size > min(batch, len(self.splits.train)):
            raise RecipeError(f"data.batch is {batch}, less than an image for each of {size} processes")

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.splits.train) // self.recipe.data.batch)

    @cached_property
    def _train(self) -> Split:
        """Return this process's slice of the training images."""
        return self.world.slice(self.splits.train)

    @cached_property
    def _validation(self) -> Split:
        return self.world.slice(self.splits.validation)

    def epoch_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield full batches only, unless the images do not fill one. epoch: counted over the whole run."""
        data = self.recipe.data
        return self._train.batches(
            data.batch,
            seed=self.recipe.seed,
            epoch=epoch,
            augment=Augmentation(**data.augment.model_dump()),
            start=start,
            drop_last=len(self._train) >= data.batch,
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

    def validate(self, model: nn.Module) -> float | None:
        """Measure accuracy in percent on the validation images, for decisions; None if there are none."""
        if not (self.splits.labelled and len(self._validation)):
            return None
        batch, precision = self.recipe.data.batch, self.precision
        return evaluate_module(model, self._validation, batch=batch, precision=precision, world=self.world).accuracy

    def test(self, model: nn.Module) -> float | None:
        """Measure accuracy in percent on the test images, for reports only; None without labels."""
        if not self.splits.labelled:
            return None
        return evaluate_module(model, self.splits.test, batch=self.recipe.data.batch).accuracy

    def recalibrate_(self, model: nn.Module, epoch: int) -> None:
        """Recompute BatchNorm statistics on training images. epoch: a number that no stage uses."""
        count = self.recipe.recalibrate_batches
        recalibrate_batchnorm_(
            model, self.epoch_batches(epoch), count=count, precision=self.precision, world=self.world
        )

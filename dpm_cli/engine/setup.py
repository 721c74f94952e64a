"""Everything that a run is given and never changes: data, device, precision, processes."""

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

CHECK_IMAGES = 8  # real inputs on which outputs before and after compaction are compared


@dataclass(frozen=True)
class Setup:
    """What every stage of one run has in common."""

    recipe: Recipe
    splits: Splits
    checkpoint: Path  # the file that survives an interruption
    device: torch.device
    precision: Precision
    should_stop: Callable[[], int] = lambda: False  # true, or the exit code to stop with
    world: World = field(default=ALONE)

    def require_enough_images(self) -> None:
        """Every process needs an image of each batch. Raises RecipeError."""
        batch, size = self.recipe.data.batch, self.world.size
        if size > min(batch, len(self.splits.train)):
            raise RecipeError(f"data.batch is {batch}, less than an image for each of {size} processes")

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.splits.train) // self.recipe.data.batch)

    @cached_property
    def _train(self) -> Split:
        """This process's slice of the training images."""
        return self.world.slice(self.splits.train)

    @cached_property
    def _validation(self) -> Split:
        return self.world.slice(self.splits.validation)

    def epoch_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches only, unless the images do not fill one. epoch: over the whole run."""
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
        """The rest of a stage's training batches, from this step on."""
        per_epoch = self.steps_per_epoch
        for epoch in range(step // per_epoch, epochs):
            yield from self.epoch_batches(first_epoch + epoch, start=max(step - epoch * per_epoch, 0))

    def check_images(self) -> Tensor:
        """(B, C, H, W) real images that are not trained on, or the first training images if there are no others."""
        held_out = self.splits.validation if len(self.splits.validation) else self.splits.train
        images, _ = next(held_out.batches(CHECK_IMAGES, seed=0, epoch=0, augment=None))
        return images

    def validate(self, model: nn.Module) -> float | None:
        """Accuracy in percent on the validation images, for every decision; None without any."""
        if not (self.splits.labelled and len(self._validation)):
            return None
        batch, precision = self.recipe.data.batch, self.precision
        return evaluate_module(model, self._validation, batch=batch, precision=precision, world=self.world).accuracy

    def test(self, model: nn.Module) -> float | None:
        """Accuracy in percent on the test images: to be reported, never to decide; None without labels."""
        if not self.splits.labelled:
            return None
        return evaluate_module(model, self.splits.test, batch=self.recipe.data.batch).accuracy

    def recalibrate_(self, model: nn.Module, epoch: int) -> None:
        """Recompute BatchNorm statistics on training images. epoch: one that no stage has."""
        count = self.recipe.recalibrate_batches
        recalibrate_batchnorm_(
            model, self.epoch_batches(epoch), count=count, precision=self.precision, world=self.world
        )

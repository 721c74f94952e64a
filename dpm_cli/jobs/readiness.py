"""Check all that a pruning run checks before it trains: exports, disk, data and schedule."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from dpm_cli.data import Splits
from dpm_cli.engine.setup import Setup
from dpm_cli.errors import DpmError
from dpm_cli.export import require_format
from dpm_cli.files import CHECKPOINT, require_space
from dpm_cli.jobs.loading import load_splits, make_setup
from dpm_cli.jobs.starting import Start
from dpm_cli.measure import count_bytes
from dpm_cli.method.schedule import plan_schedule
from dpm_cli.recipe import Recipe
from dpm_cli.results import PlannedRun

T = TypeVar("T")
COPIES = 4  # of the weights in two checkpoints, each with the optimizer's momentum


def require_means(recipe: Recipe, start: Start, folder: Path) -> None:
    """Check that the exports can be made, and that their folder has room. Raises UsageError or OutputError."""
    for format in recipe.export:
        require_format(format)
    require_space(folder, count_bytes(start.module) * (COPIES + len(recipe.export)))


class Readiness:
    """Finds what would keep a run from beginning; all problems, not only the first."""

    def __init__(self, recipe: Recipe, start: Start, device: torch.device, folder: Path) -> None:
        self.errors: list[DpmError] = []
        self.run: PlannedRun | None = None
        self._try(lambda: require_means(recipe, start, folder))
        self.splits: Splits | None = self._try(lambda: load_splits(recipe, device))
        if self.splits is not None:
            setup = make_setup(recipe, self.splits, folder / CHECKPOINT, device)
            self.run = self._try(lambda: _plan_run(recipe, setup))

    @property
    def exit_code(self) -> int:
        return self.errors[0].exit_code if self.errors else 0

    def _try(self, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except DpmError as error:
            self.errors.append(error)
            return None


def _plan_run(recipe: Recipe, setup: Setup) -> PlannedRun:
    """Count images and rounds. Raises RecipeError if the schedule does not fit."""
    setup.require_enough_images()
    splits, rounds, decay_steps = setup.splits, 0, 0
    if not recipe.cuts_weights:
        planned = plan_schedule(recipe.prune, recipe.train, recipe.decay, steps_per_epoch=setup.steps_per_epoch)
        rounds, decay_steps = len(planned.starts), planned.decay_steps
    return PlannedRun(
        train=len(splits.train),
        validation=len(splits.validation),
        test=len(splits.test),
        steps_per_epoch=setup.steps_per_epoch,
        rounds=rounds,
        decay_steps=decay_steps,
    )

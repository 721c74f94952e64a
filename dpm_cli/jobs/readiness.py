"""Check all that a pruning run checks before it trains: exports, disk, data and schedule."""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from dpm_cli.data import Splits
from dpm_cli.engine.setup import Setup
from dpm_cli.errors import DpmError, FormatError, UnsupportedModelError, one_line
from dpm_cli.export import export_model, require_format
from dpm_cli.files import CHECKPOINT, require_space
from dpm_cli.jobs.loading import load_splits, make_setup
from dpm_cli.jobs.starting import Start
from dpm_cli.layers.outputs import output_tensors
from dpm_cli.measure import count_bytes
from dpm_cli.method.schedule import plan_schedule
from dpm_cli.models.outputs import sample_images
from dpm_cli.recipe import Recipe, is_own_code
from dpm_cli.results import PlannedRun
from dpm_cli.run.exporting import EXPORT_NAMES

T = TypeVar("T")
COPIES = 4  # of the weights in two checkpoints, each with the optimizer's momentum


def require_means(recipe: Recipe, start: Start, folder: Path) -> None:
    """Check that the exports can be made, and that their folder has room. Raises UsageError or OutputError."""
    for format in recipe.export:
        require_format(format)
    require_space(folder, count_bytes(start.module) * (COPIES + len(recipe.export)))


def require_workable(recipe: Recipe, start: Start) -> None:
    """Check that a model of the user's own code can be trained, and exported. Raises UnsupportedModelError."""
    require_trainable(recipe, start)
    require_exportable(recipe, start)


def require_trainable(recipe: Recipe, start: Start) -> None:
    """Run a model of the user's own code forward and backward. Raises UnsupportedModelError if it does not allow that.

    The models of dpm, torchvision and timm do.
    """
    if not _is_own(start):
        return
    module = copy.deepcopy(start.module).train()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            outputs = output_tensors(module(sample_images(module, recipe.model.input)))
            for output in outputs:
                if output.requires_grad:
                    output.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    except Exception as error:  # a user's module may raise anything
        raise UnsupportedModelError(f"the model cannot be trained: {one_line(error)}") from None


def require_exportable(recipe: Recipe, start: Start) -> None:
    """Export a model of the user's own code before it is trained. Raises UnsupportedModelError if no format takes it.

    A run goes on without one of several files; without all of them its hours are lost.
    """
    if not recipe.export or not _is_own(start):
        return
    image, first = sample_images(start.module, recipe.model.input, count=1), None
    with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
        for format in recipe.export:
            exact = "onnx" if format == "onnx-int8" else format  # which it is made from
            path = Path(folder) / EXPORT_NAMES[exact]
            try:
                export_model(start.module, image, format=exact, path=path, metadata={}, opset=recipe.opset)
            except FormatError as error:
                first = first or error
            else:
                return
    raise UnsupportedModelError(
        f"tried before training, the model cannot be exported: {first}; change its code (a batch of any size must do), "
        "or prune without files: --set export=[]"
    )


def _is_own(start: Start) -> bool:
    return start.arch is None or is_own_code(start.arch)


class Readiness:
    """Finds what would keep a run from beginning; all problems, not only the first."""

    def __init__(self, recipe: Recipe, start: Start, device: torch.device, folder: Path) -> None:
        self.errors: list[DpmError] = []
        self.run: PlannedRun | None = None
        self._try(lambda: require_means(recipe, start, folder))
        self._try(lambda: require_trainable(recipe, start))
        self._try(lambda: require_exportable(recipe, start))
        self.splits: Splits | None = self._try(lambda: load_splits(recipe, device))
        if self.splits is not None:
            setup = self._try(partial(make_setup, recipe, self.splits, folder / CHECKPOINT, device))
            self.run = self._try(partial(_plan_run, recipe, setup)) if setup else None

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

"""Take the dense model as the teacher, unless it only guesses."""

import copy
from collections.abc import Iterator, Sequence

from torch import nn

from dpm_cli.engine.setup import Setup
from dpm_cli.recipe.stages import Stage
from dpm_cli.run.course import Trainee
from dpm_cli.tasks.classification import is_at_chance

ENOUGH = 50  # validation images; among fewer, a model that knows something may look like one that guesses


def copy_teacher(model: nn.Module, stages: Sequence[Stage]) -> nn.Module | None:
    """Copy the dense model for distillation; None if no stage learns from it."""
    if not any(stage.training.epochs and stage.training.distill for stage in stages):
        return None
    return copy.deepcopy(model).eval().requires_grad_(False)


def dismiss_guessing_(trainee: Trainee, setup: Setup, *, classes: int, accuracy: float | None = None) -> Iterator[str]:
    """Let a teacher that only guesses go, and say so: it would hold the slim model back for the whole run.

    accuracy: of the dense model on the validation images, in percent, if it was measured before.
    """
    images = len(setup.splits.validation)
    if trainee.teacher is None or images < ENOUGH:
        return
    if accuracy is None:
        accuracy = setup.validate(trainee.teacher)
    if accuracy is not None and is_at_chance(accuracy, images=images, classes=classes):
        trainee.teacher = None
        yield (
            f"the dense model guesses: {accuracy:.2f} % of {images:,} validation images, in {classes} classes. It does "
            "not teach, labels alone do. If it is new, train it first (dpm train); if it was trained, check data.mean, "
            "data.std and the order of the classes"
        )

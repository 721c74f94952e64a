"""Compute the learning rate from the step alone, so that a resumed run needs no schedule state."""

import math
from typing import assert_never

from torch.optim import Optimizer

from dpm_cli.recipe.sections import Training


def learning_rate(step: int, training: Training, *, steps: int, steps_per_epoch: int) -> float:
    """Compute the learning rate at a step (0, 1, …) of a stage; a cosine reaches 0 at `steps`.

    Warm-up is linear over `warmup_epochs` and ends at `lr`. `milestones` are fractions of the stage, `step_size` counts
    epochs; both count from the start of the stage, warm-up included. The triangular schedule rises from gamma · lr to
    lr at the middle of the stage, and falls back.
    """
    warmup = round(training.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return training.lr * (step + 1) / warmup
    match training.schedule:
        case "constant":
            return training.lr
        case "cosine":
            return training.lr * 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1)))
        case "triangular":
            return training.lr * (training.gamma + (1 - training.gamma) * (1 - abs(2 * step / max(steps, 1) - 1)))
        case "step":
            return training.lr * training.gamma ** (step // (training.step_size * steps_per_epoch))
        case "multistep":
            return training.lr * training.gamma ** sum(step >= milestone * steps for milestone in training.milestones)
        case _:
            assert_never(training.schedule)


def set_learning_rate_(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all groups. Call before the step."""
    for group in optimizer.param_groups:
        group["lr"] = lr

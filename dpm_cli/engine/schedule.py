"""The learning rate as a function of the step alone, so that a resumed run needs no schedule state."""

import math
from collections.abc import Sequence
from typing import Literal, assert_never

from torch.optim import Optimizer


def learning_rate(
    step: int,
    *,
    steps: int,
    steps_per_epoch: int,
    lr: float,
    schedule: Literal["cosine", "step", "multistep", "triangular", "constant"],
    warmup_epochs: float = 0,
    milestones: Sequence[float] = (),
    step_size: int = 30,
    gamma: float = 0.1,
) -> float:
    """The learning rate of step 0, 1, … of a stage of `steps`; at `steps` itself a cosine has reached 0.

    Warm-up is linear over `warmup_epochs` and ends at `lr`. `milestones` are fractions of the stage, `step_size` counts
    epochs; both count from the start of the stage, warm-up included. Triangular: from gamma · lr up to lr at half of
    the stage, and back.
    """
    warmup = round(warmup_epochs * steps_per_epoch)
    if step < warmup:
        return lr * (step + 1) / warmup
    match schedule:
        case "constant":
            return lr
        case "cosine":
            return lr * 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1)))
        case "triangular":
            return lr * (gamma + (1 - gamma) * (1 - abs(2 * step / max(steps, 1) - 1)))
        case "step":
            return lr * gamma ** (step // (step_size * steps_per_epoch))
        case "multistep":
            return lr * gamma ** sum(step >= milestone * steps for milestone in milestones)
        case _:
            assert_never(schedule)


def set_learning_rate_(optimizer: Optimizer, lr: float) -> None:
    """Call before the step."""
    for group in optimizer.param_groups:
        group["lr"] = lr

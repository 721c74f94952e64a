"""Describe the stages of a run: stretches of training with their own settings. A base pruner names those it needs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dpm_cli.recipe.sections import Training


@dataclass(frozen=True)
class Stage:
    """Describes one stretch of training."""

    name: str
    training: Training
    settings: str  # prefix of its settings in the recipe, for messages
    prunes: bool = False  # units are chosen and decay in this stage
    penalises: bool = False  # the base pruner adds to the gradients, but nothing is chosen yet
    ends_with_pruning: bool = False  # skipped once the target is met
    first_epoch: int = 0  # counted over the whole run, so that stages do not repeat the data order


def number_epochs(stages: Iterable[Stage]) -> list[Stage]:
    """Give every stage its first epoch, and drop stages without epochs.

    A pruning stage stays even without epochs, unless it `ends_with_pruning`: all units are then cut at once in it.
    """
    numbered: list[Stage] = []
    epoch = 0
    for stage in stages:
        if stage.training.epochs or (stage.prunes and not stage.ends_with_pruning):
            numbered.append(replace(stage, first_epoch=epoch))
            epoch += stage.training.epochs
    return numbered


def steps_before(stages: Iterable[Stage], stage: Stage, steps_per_epoch: int) -> int:
    """Count the steps of the pruning stages before this one."""
    earlier = (each for each in stages if each.prunes and each.first_epoch < stage.first_epoch)
    return sum(each.training.epochs for each in earlier) * steps_per_epoch

"""The stages of a run: stretches of training, each with settings of its own. A base pruner names those it needs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dpm_cli.recipe.sections import Training


@dataclass(frozen=True)
class Stage:
    """One stretch of training."""

    name: str
    training: Training
    settings: str  # how the names of its settings begin in the recipe, for messages
    prunes: bool = False  # units are chosen and decay in it
    penalises: bool = False  # the base pruner adds to the gradients, but nothing is chosen yet
    ends_with_pruning: bool = False  # it is left out once the target is met
    first_epoch: int = 0  # over the whole run: data order never repeats between stages


def number_epochs(stages: Iterable[Stage]) -> list[Stage]:
    """The stages in order, each with its first epoch; those without epochs are left out.

    Except one that prunes to the end of the run: without epochs, all units are cut at once in it.
    """
    numbered: list[Stage] = []
    epoch = 0
    for stage in stages:
        if stage.training.epochs or (stage.prunes and not stage.ends_with_pruning):
            numbered.append(replace(stage, first_epoch=epoch))
            epoch += stage.training.epochs
    return numbered


def steps_before(stages: Iterable[Stage], stage: Stage, steps_per_epoch: int) -> int:
    """Steps of the stages that prune, before this one."""
    earlier = (each for each in stages if each.prunes and each.first_epoch < stage.first_epoch)
    return sum(each.training.epochs for each in earlier) * steps_per_epoch

"""The stages of a run: stretches of training, each with settings of its own."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dpm_cli.recipe import Recipe, Training

StageName = Literal["sparse", "train", "tick", "tock", "finetune"]


@dataclass(frozen=True)
class Stage:
    """One stretch of training."""

    name: StageName
    training: Training
    first_epoch: int  # over the whole run: data order never repeats between stages
    settings: str  # how the names of its settings begin in the recipe

    @property
    def prunes(self) -> bool:
        """Whether units are chosen and decay in it."""
        return self.name in ("train", "tick", "tock")

    @property
    def ends_with_pruning(self) -> bool:
        """Whether it is left out once the target is met."""
        return self.name in ("tick", "tock")


def plan_stages(recipe: Recipe) -> list[Stage]:
    """The stages that the base pruner asks for, then fine-tuning; those without epochs are left out.

    Except `train`: without epochs, all units are cut at once in it.
    """
    planned: Planned
    match recipe.prune.base:
        case "gate-decorator":
            planned = _ticks_and_tocks(recipe)
        case "on-the-fly":
            planned = [("sparse", recipe.train, "train.")]
        case _:
            planned = _sparse_then_train(recipe)
    stages, epoch = [], 0
    for name, training, settings in [*planned, ("finetune", recipe.finetune, "finetune.")]:
        if training.epochs or name == "train":
            stages.append(Stage(name, training, epoch, settings))
            epoch += training.epochs
    return stages


Planned = Iterable[tuple[StageName, Training, str]]


def _sparse_then_train(recipe: Recipe) -> Planned:
    prune = recipe.prune
    # The penalty takes the place of weight decay, as in DepGraph's own sparse learning.
    changes = {"epochs": prune.sparse_epochs, "lr": prune.sparse_lr, "weight_decay": 0.0}
    yield "sparse", recipe.train.model_copy(update=changes), "prune.sparse_"
    yield "train", recipe.train, "train."


def _ticks_and_tocks(recipe: Recipe) -> Planned:
    """A tock, then a tick for every round and a tock after each so many, and at the end (Gate Decorator, §3.3)."""
    rounds, gates = recipe.prune.rounds, recipe.prune.gates
    tick = recipe.train.model_copy(
        update={"epochs": gates.tick_epochs, "lr": gates.tick_lr, "schedule": "constant", "warmup_epochs": 0.0}
    )
    yield "tock", recipe.train, "train."
    for number in range(1, rounds + 1):
        yield "tick", tick, "prune.gates.tick_"
        if number % gates.ticks_per_tock == 0 or number == rounds:
            yield "tock", recipe.train, "train."

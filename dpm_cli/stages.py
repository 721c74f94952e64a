"""The stages of a run: stretches of training, each with settings of its own."""

from dataclasses import dataclass
from typing import Literal

from dpm_cli.recipe import Recipe, Training

StageName = Literal["sparse", "train", "finetune"]


@dataclass(frozen=True)
class Stage:
    """One stretch of training."""

    name: StageName
    training: Training
    first_epoch: int  # over the whole run: data order never repeats between stages

    @property
    def prunes(self) -> bool:
        """Whether units are chosen and decay in it."""
        return self.name == "train"


def plan_stages(recipe: Recipe) -> list[Stage]:
    """Sparse learning (if asked for), pruning, fine-tuning; those without epochs are left out.

    Pruning without epochs stays: all units are cut at once in it.
    """
    sparse = recipe.train.model_copy(
        # The penalty takes the place of weight decay, as in DepGraph's own sparse learning.
        update={"epochs": recipe.prune.sparse_epochs, "lr": recipe.prune.sparse_lr, "weight_decay": 0.0}
    )
    planned: list[tuple[StageName, Training]] = [
        ("sparse", sparse),
        ("train", recipe.train),
        ("finetune", recipe.finetune),
    ]
    stages, epoch = [], 0
    for name, training in planned:
        if training.epochs or name == "train":
            stages.append(Stage(name, training, epoch))
            epoch += training.epochs
    return stages

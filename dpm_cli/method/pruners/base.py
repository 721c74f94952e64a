"""The seam between a base pruner, which says which units are redundant and when, and everything else."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.optim import Optimizer

from dpm_cli.graph import Groups, Units
from dpm_cli.method.budget import Scores
from dpm_cli.method.rounds import Rounds
from dpm_cli.recipe.sections import Decay
from dpm_cli.recipe.stages import Stage

Indices = npt.NDArray[np.int64]
Pace = Literal["rounds", "ticks", "steps"]


class BasePruner:
    """One redundancy criterion and its schedule, bound to one model at a time.

    What a method does not need stays as it is here. `pace` says how its units come to be chosen:

    - "rounds": every round takes its share of what must go, the lowest scores first;
    - "ticks": a round takes the units that the method has marked by then;
    - "steps": one long round takes the units that the method marks, after every step.
    """

    title: str  # the method and its variant, for people
    pace: Pace = "rounds"

    def stages(self) -> Sequence[Stage]:
        """The stretches of training that the method needs, in order; fine-tuning follows."""
        raise NotImplementedError

    def rounds(self, stages: Sequence[Stage], decay: Decay, *, steps_per_epoch: int) -> Rounds:
        """When its rounds start, in steps over all stages that prune. Raises RecipeError if they do not fit."""
        raise NotImplementedError

    def choosable(self, groups: Groups, model: nn.Module) -> Groups:
        """The groups that the method can judge; the others are kept whole, with a reason."""
        return groups

    def prepare_(self, model: nn.Module, groups: Groups) -> Groups:
        """Change a dense model for the method, but not its function. Returns the groups of what it is now."""
        return groups

    def restore_(self, model: nn.Module) -> None:
        """Undo `prepare_` on a model that was compacted since, without changing its function."""

    def bind(self, groups: Groups, model: nn.Module, survivors: Indices | None = None) -> None:
        """Look at this model from now on.

        survivors: (units,) indices into the units before a compaction; None for a model not seen before.
        """
        raise NotImplementedError

    def decays(self, groups: Groups, model: nn.Module) -> Units | None:
        """The part of every unit that shrinks to zero, the rest follows at once; None for all of its producer side."""
        return None

    def enter(self, stage: Stage, model: nn.Module, step: int) -> None:
        """A stage of the run begins, or goes on from `step` after an interruption; its optimizer is not made yet."""

    def meet(self, optimizer: Optimizer) -> None:
        """This optimizer takes the steps from now on. Called before the first step of every stage."""

    def end_epoch(self) -> None:
        """An epoch is over, of a stage that prunes or prepares for it."""

    def before_step_(self) -> None:
        """Between backward and the optimizer's step: read the gradients of the loss, then add penalties to them."""

    def after_step_(self, lr: float, going: Tensor) -> None:
        """After every optimizer step of a stage that prunes. lr: of that step. going: (units,) decaying or dead."""

    def start_round(self, redundant: int, steps: int) -> None:
        """The long round of the pace "steps" begins.

        redundant: how many units would have to go by the scores. steps: how long the round may last.
        """

    def mark_(self, spared: Tensor) -> None:
        """Push redundant units towards zero and mark those that may go now.

        For the pace "steps", after `after_step_` while the target is missed. spared: (units,) to be left alone.
        """

    def marked(self) -> Tensor:
        """(units,) those that may be chosen now, for the paces "ticks" and "steps". A unit once marked stays so."""
        raise NotImplementedError

    def scores(self) -> Scores:
        """(units,) low is redundant. Called at rounds only; may wait for the device."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors, numbers, strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bound to the same model."""

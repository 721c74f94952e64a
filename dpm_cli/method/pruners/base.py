"""Define the interface of a base pruner, which decides which units are redundant and when."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.optim import Optimizer

from dpm_cli.graph import Groups, Units
from dpm_cli.method.budget import Scores, Weights
from dpm_cli.method.rounds import Rounds
from dpm_cli.recipe.sections import Decay
from dpm_cli.recipe.stages import Stage

Indices = npt.NDArray[np.int64]
Pace = Literal["rounds", "ticks", "steps"]


class BasePruner:
    """Implements one redundancy criterion and its schedule, bound to one model at a time.

    Subclasses override only the methods they need. `pace` says how units are chosen:

    - "rounds": every round chooses its share of the units to remove, lowest scores first;
    - "ticks": a round chooses the units that the method has marked by then;
    - "steps": in one long round, newly marked units are chosen after every step.
    """

    title: str  # name of the method and its variant, for messages
    pace: Pace = "rounds"
    observes: int = 0  # batches that `observe_` is to see before each round

    @property
    def scores_are_losses(self) -> bool:
        """Tell whether scores are what the loss would rise by, so that units go by what is lost per cost saved."""
        return False

    def stages(self) -> Sequence[Stage]:
        """List the stages of training that the method needs, in order; fine-tuning follows."""
        raise NotImplementedError

    def rounds(self, stages: Sequence[Stage], decay: Decay, *, steps_per_epoch: int) -> Rounds:
        """Plan when rounds start, in steps over all stages that prune. Raises RecipeError if they do not fit."""
        raise NotImplementedError

    def choosable(self, groups: Groups, model: nn.Module) -> Groups:
        """Return the groups with those that the method cannot judge kept whole, each with a reason."""
        return groups

    def prepare_(self, model: nn.Module, groups: Groups) -> Groups:
        """Change a dense model as the method needs, but not its function. Returns the groups of the changed model."""
        return groups

    def restore_(self, model: nn.Module) -> None:
        """Undo `prepare_` on the model, which may be compacted by now, without changing its function."""

    def bind(self, groups: Groups, model: nn.Module, survivors: Indices | None = None) -> None:
        """Use this model from now on.

        survivors: (units,) indices into the units before a compaction; None for a new model.
        """
        raise NotImplementedError

    def decays(self, groups: Groups, model: nn.Module) -> Units | None:
        """Return the part of each unit that decays; the rest is zeroed at death. None: all of its producer side."""
        return None

    def enter(self, stage: Stage, model: nn.Module, step: int) -> None:
        """Start a stage, or resume it at `step`. Called before its optimizer is made."""

    def meet(self, optimizer: Optimizer) -> None:
        """Use this optimizer from now on. Called before the first step of every stage."""

    def end_epoch(self) -> None:
        """Called after each epoch of a stage that prunes or prepares for pruning."""

    def before_step_(self) -> None:
        """Read the gradients of the loss, then add penalties. Called between backward and the optimizer's step.

        What was read counts only from `after_step_` on, because a gradient scaler may skip the step.
        """

    def after_step_(self, lr: float, going: Tensor) -> None:
        """Called after every step of a stage that prunes. lr: of that step. going: (units,) decaying or dead."""

    def observe_(self) -> None:
        """Read the gradients that a batch gives, finite or not. The next round's scores are by all that were read."""

    def forget_(self) -> None:
        """Observe anew from now on. Called when a round has chosen its units."""

    def start_round(self, redundant: int, steps: int) -> None:
        """Start the long round of pace "steps".

        redundant: number of units that must go, as ranked by score. steps: maximum length of the round.
        """

    def mark_(self, spared: Tensor) -> None:
        """Push redundant units towards zero, and mark those that may go now.

        Called at pace "steps", after `after_step_`, until the target is met. spared: (units,) units to leave alone.
        """

    def marked(self) -> Tensor:
        """Return (units,) which units may be chosen now, for paces "ticks" and "steps"."""
        raise NotImplementedError

    def unmark_(self, released: Tensor) -> None:
        """Withdraw the marks of units that a round released. Called at its end. released: (units,)."""

    def scores(self) -> Scores:
        """Score (units,): low is redundant. Called only at rounds; may wait for the device."""
        raise NotImplementedError

    def weights(self) -> Weights | None:
        """Return (groups,) what scores are multiplied by where those of several groups are summed; None: by one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors, numbers and strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, while bound to the same model."""

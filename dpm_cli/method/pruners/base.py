"""The seam between a base pruner, which says which units are redundant, and everything else."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from dpm_cli.graph import Groups, Units
from dpm_cli.method.budget import Scores
from dpm_cli.method.stages import StageName

Indices = npt.NDArray[np.int64]


class BasePruner:
    """One redundancy criterion, bound to one model at a time. What a method does not need stays as it is here.

    A round names victims by `scores`: all units, or those that the method has condemned (`condemns`). A base that
    condemns units in the middle of training (`condemns_each_step`) is asked after every step of its only round.
    """

    warm_up: int = 0  # training steps that it must see before the first round
    condemns: bool = False
    condemns_each_step: bool = False

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

        survivors: (units,) indices into the units before a compaction; none: a model not seen before.
        """
        raise NotImplementedError

    def decays(self, groups: Groups, model: nn.Module) -> Units | None:
        """The part of every unit that shrinks to zero, the rest follows at once; none: all of its producer side."""
        return None

    def enter(self, stage: StageName, model: nn.Module, step: int) -> None:
        """A stage of the run begins, or goes on from `step` after an interruption; its optimizer is not made yet."""

    def end_epoch(self) -> None:
        """An epoch is over, of a stage that prunes or prepares for it."""

    def before_step_(self) -> None:
        """Between backward and the optimizer's step: read the gradients of the loss, then add penalties to them."""

    def start_round(self, redundant: int, steps: int) -> None:
        """The round begins, for a base that condemns units each step.

        redundant: how many would have to go by the scores. steps: how long the round may last.
        """

    def after_step_(self, lr: float, going: Tensor, released: Tensor, is_wanted: bool) -> None:
        """After every optimizer step of a stage that prunes.

        lr: of that step. going: (units,) decaying or dead. released: (units,) in this round; both are to be left alone.
        is_wanted: for a base that condemns units each step, whether its round has started and the target is still
        missed.
        """

    def condemned(self) -> Tensor:
        """(units,) those that may be chosen now, for a base that condemns: once at every round, or after every step.
        A unit once condemned stays so.
        """
        raise NotImplementedError

    def scores(self) -> Scores:
        """(units,) low is redundant. Called at rounds only; may wait for the device."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors, numbers, strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bound to the same model."""

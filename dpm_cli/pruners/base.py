"""The seam between a base pruner, which says which units are redundant, and everything else."""

from typing import Any, Protocol

from torch import nn

from dpm_cli.budget import Scores
from dpm_cli.graph import Groups


class BasePruner(Protocol):
    """One redundancy criterion, bound to one model at a time."""

    def bind(self, groups: Groups, model: nn.Module) -> None:
        """Look at this model from now on. Called at the start and after every compaction."""

    def penalise_(self) -> None:
        """Add the sparse-learning gradient. Called between backward and the optimizer's step of the sparse stage."""

    def scores(self) -> Scores:
        """(units,) low is redundant. Called at rounds only; may wait for the device."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors, numbers, strings."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

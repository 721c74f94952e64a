"""Remove dead units for real: what is checked first, and how the units left are numbered in the dense model."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from dpm_cli.errors import RunError
from dpm_cli.graph import Groups, Kept
from dpm_cli.graph.compact import KeptPositions
from dpm_cli.graph.labels import Flags, Ids
from dpm_cli.graph.program import Example
from dpm_cli.graph.trial import TOLERANCE, Trial


@dataclass(frozen=True)
class Removal:
    """Describes what the end of a round removed."""

    removed: int
    released: int
    difference: float  # largest relative difference between outputs before and after
    kept: KeptPositions  # for every tensor that lost positions
    before: Mapping[str, nn.Parameter]  # the old parameters, to find the optimizer's state
    held: tuple[Kept, ...] = ()  # layers that stay whole from now on, because removing their units changed outputs


def check_removal(model: nn.Module, example: Example, groups: Groups, dead: Flags) -> tuple[float, Mapping[int, str]]:
    """Compare outputs without the dead units, on copies of the model, in which they are zero. dead: (units,)

    Returns the relative difference, and the groups that have to stay for it, by their numbers, with the reasons.
    Raises RunError if no group could lose anything.
    """
    trial = Trial(model, example, groups, ~dead)
    difference = trial.difference(trial.losing)
    if difference <= TOLERANCE:
        return difference, {}
    culprits = trial.find_culprits()
    if len(culprits) == len(groups) or not trial.is_repeatable():
        raise RunError(
            f"removing {int(dead.sum())} dead units changed the outputs by {difference:.1e} (allowed {TOLERANCE:.0e}), "
            "so the run stops; please report this model"
        )
    return trial.difference([i for i in trial.losing if i not in culprits]), culprits


class Ancestry:
    """Remembers what is left of the dense model's units, and which of its groups turned out to have to stay whole."""

    def __init__(self, groups: Groups) -> None:
        """groups: of the dense model."""
        self.survivors: Flags = np.ones(groups.units, bool)  # of its units
        self.held: dict[int, str] = {}  # numbers of its groups, with the reasons
        self._dense, self._layer_macs = groups.groups, groups.layer_macs
        self._groups: Ids = np.arange(len(groups))  # the dense numbers of the groups that may still lose units
        self.units: Ids = np.arange(groups.units)  # the dense numbers of their units, (units now,)

    @property
    def kept(self) -> list[Kept]:
        """Return the layers that turned out to have to stay whole."""
        return [
            Kept(layer, reason, self._layer_macs.get(layer, 0))
            for i, reason in self.held.items()
            for layer in self._dense[i].layers
        ]

    def lose(self, dead: Flags) -> None:
        """Forget the units that leave. dead: (units now,)"""
        self.survivors[self.units[dead]] = False
        self.units = self.units[~dead]

    def hold(self, culprits: Mapping[int, str], group_of_unit: Ids) -> Flags:
        """Note groups, by their present numbers, whose units stay for good. group_of_unit: (units now,)

        Returns (units now,) which units belong to the other groups.
        """
        self.held |= {int(self._groups[i]): reason for i, reason in culprits.items()}
        stays: Flags = ~np.isin(group_of_unit, list(culprits))
        self._groups, self.units = np.delete(self._groups, list(culprits)), self.units[stays]
        return stays

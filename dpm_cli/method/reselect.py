"""Self-Rectifying by choosing again: in the middle of a decay, gradients correct what was chosen by size.

The paper (DPM, arXiv 2406.03879) lets the gradients of decaying structures correct the decision; how is not printed.
Here, inferred: during a decay |⟨x, g⟩| is summed for all units, decaying ones scaled to their full length, which is to
first order what the loss would change by if the unit left. After the fraction `start` of the decay, units are chosen
once more, by their rank in the base pruner's scores plus their rank in that sum, for the same target. Who is no longer
chosen is released; who is new is zero at the same step as the others. So a release has a price, the unit that goes in
its place, and the target is met without waiting.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dpm_cli.graph import Units
from dpm_cli.method.budget import Scores, rank
from dpm_cli.method.rectify import TINY, Rectifier
from dpm_cli.recipe.sections import Rectify


def rank_in_one(scores: Scores) -> Scores:
    """Rank (units,) scores from 0 for the lowest to 1 for the highest."""
    return rank(scores) / max(len(scores) - 1, 1)


def make_rectifier(
    settings: Rectify | None, group_of_unit: Tensor, groups: int, *, in_rounds: bool
) -> "Rectifier | Reselection | None":
    """Make what watches the gradients while units decay, if anything does.

    group_of_unit: (units,) on the device. in_rounds: as in `Rectify.resolve`.
    """
    if settings is None:
        return None
    if settings.resolve(in_rounds=in_rounds).criterion == "reselect":
        return Reselection(len(group_of_unit), group_of_unit.device, settings)
    return Rectifier(group_of_unit, groups, settings)


class Reselection:
    """Watches all units while some decay. Takes the place of a `Rectifier`, but releases none by itself."""

    def __init__(self, count: int, device: torch.device, settings: Rectify) -> None:
        """count: number of units."""
        self.settings = settings.resolve(in_rounds=True)
        self.evidence = torch.zeros(count, device=device)
        self.ranked = torch.zeros(count, dtype=torch.float64, device=device)  # by the base pruner, as the round began

    def bind(self, group_of_unit: Tensor, groups: int) -> None:
        """Units are not compared within their groups."""

    def start(self, scores: Scores) -> None:
        """Begin a round. scores: (units,) that its victims were chosen by."""
        self.evidence = torch.zeros_like(self.evidence)
        self.ranked = torch.from_numpy(rank_in_one(scores)).to(self.evidence.device)

    def is_due(self, elapsed: int, steps: int) -> bool:
        """Tell whether to choose again after so many steps of a decay of `steps`: neither the first nor the last."""
        return elapsed == min(max(math.ceil((self.settings.start or 0) * steps), 1), steps - 1)

    def observe(self, units: Units, norms: Tensor) -> None:
        """Store ⟨x, g⟩ of the raw gradient g. norms: (units,) ‖x‖."""
        self._norm, self._dot = norms, units.dot(units.gradients(), units.weights())

    def judge(
        self, units: Units, updated: Tensor, decaying: Tensor, age: Tensor, initial: Tensor, steps: int
    ) -> Tensor:
        """Count what this step showed; find (units,) none to release. Arguments as of `Rectifier.judge`."""
        shrunk = torch.where(decaying, initial / self._norm.clamp_min(TINY), 1.0)
        self.evidence = self.evidence + self._dot.abs() * shrunk
        return torch.zeros_like(decaying)

    def scores(self) -> Scores:
        """Return (units,) what the victims are chosen by this time. Waits for the device."""
        evidence = self.evidence.double().cpu().numpy()
        return self.ranked.cpu().numpy() + rank_in_one(evidence)

    def select(self, survivors: Tensor) -> None:
        """Keep only the state of these units. survivors: (kept,) indices."""
        self.evidence, self.ranked = self.evidence[survivors], self.ranked[survivors]

    def state_dict(self) -> dict[str, Any]:
        return {"evidence": self.evidence, "ranked": self.ranked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if any(state[name].shape != self.evidence.shape for name in ("evidence", "ranked")):
            raise ValueError(f"the state of choosing again is not of {len(self.evidence)} units")
        self.evidence, self.ranked = (state[name].to(self.evidence.device) for name in ("evidence", "ranked"))

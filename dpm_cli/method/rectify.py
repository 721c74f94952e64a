"""Self-Rectifying: a decaying unit that training fights for is released (DPM, arXiv 2406.03879).

The paper names two criteria, an escape rate and a gradient length relative to the layer; it does not print their closed
forms, how they combine or when they are judged. We define all of these here, as settings. One mini-batch says almost
nothing about a unit, so `significance` averages the escape rate over the decay and measures it in its own
standard errors; its threshold does not depend on the network (benchmarks/RESULTS.md compares the criteria).
"""

from typing import Any

import torch
from torch import Tensor

from dpm_cli.graph import Units
from dpm_cli.recipe.sections import Rectify

TINY = 1e-12


def cosine_rate(dot: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Compute (units,) −<x, g> / (‖x‖‖g‖): 1 if descent only lengthens the unit, −1 if it only shortens it."""
    return -dot / (weight * gradient).clamp_min(TINY)


def norm_per_update(updated: Tensor, weight: Tensor, update: Tensor) -> Tensor:
    """Compute (units,) (‖x̃‖ − ‖x‖) / ‖x̃ − x‖: growth per length of the optimizer's update, in [−1, 1]."""
    return (updated - weight) / update.clamp_min(TINY)


def norm_per_decay(updated: Tensor, weight: Tensor, decay: Tensor) -> Tensor:
    """Compute (units,) (‖x̃‖ − ‖x‖) / L_s: 1 if the update undoes one step of the decay."""
    return (updated - weight) / decay.clamp_min(TINY)


def norm_relative(updated: Tensor, weight: Tensor) -> Tensor:
    """Compute (units,) (‖x̃‖ − ‖x‖) / ‖x‖."""
    return (updated - weight) / weight.clamp_min(TINY)


def significance(mean: Tensor, mean_square: Tensor, count: Tensor) -> Tensor:
    """Divide (units,) a mean over `count` values by its own standard error; 0 for fewer than two values."""
    variance = (mean_square - mean.square()).clamp_min(0) / (count - 1).clamp_min(1)
    return torch.where(count > 1, mean / variance.sqrt().clamp_min(TINY), 0.0)


def relative_length(gradient: Tensor, group_of_unit: Tensor, groups: int) -> Tensor:
    """Divide (units,) ‖g‖ by its mean over the units of the same group; 1 on average."""
    sums = gradient.new_zeros(groups).index_add_(0, group_of_unit, gradient)
    sizes = gradient.new_zeros(groups).index_add_(0, group_of_unit, torch.ones_like(gradient))
    return gradient / (sums / sizes.clamp_min(1)).clamp_min(TINY)[group_of_unit]


class Rectifier:
    """Judges every decaying unit at every step, on the raw loss gradient.

    Call `observe` after backward and before any penalty touches the gradients, then `judge` after the optimizer's step.
    """

    def __init__(self, group_of_unit: Tensor, groups: int, settings: Rectify) -> None:
        """group_of_unit: (units,) on the units' device."""
        self.settings = settings.resolve(in_rounds=False)
        self.bind(group_of_unit, groups)
        zeros = torch.zeros(len(group_of_unit), device=group_of_unit.device)
        self.mean_rate, self.mean_length = zeros.clone(), zeros.clone()  # (units,) smoothed, not yet bias-corrected
        self.mean_square = zeros.clone()  # (units,) of the rate; only for "significance"
        self.hits = torch.zeros_like(group_of_unit)  # (units,) number of consecutive steps that called for release
        self._weights: list[Tensor] = []

    def bind(self, group_of_unit: Tensor, groups: int) -> None:
        """Use these groups from now on. group_of_unit: (units,) on the units' device."""
        self.group_of_unit, self.groups = group_of_unit, groups

    def observe(self, units: Units, norms: Tensor) -> None:
        """Store what the criteria need of x and of the raw gradient g. norms: (units,) ‖x‖."""
        self._norm = norms
        if self.settings.criterion in ("cosine", "significance"):
            self._gradient, self._dot = units.compare(units.gradients(), units.weights())
        else:
            self._gradient = units.norm(units.gradients())
        if self.settings.criterion == "norm_per_update":
            self._weights = [weight.clone() for weight in units.weights()]

    def judge(
        self, units: Units, updated: Tensor, decaying: Tensor, age: Tensor, initial: Tensor, steps: int
    ) -> Tensor:
        """Find (units,) the decaying units that training fights for.

        updated: (units,) norms after the optimizer's step. age: (units,) steps of decay including this one.
        initial: (units,) norms at the start of the decay. steps: N.
        """
        match self.settings.criterion:
            case "cosine" | "significance":
                rate = cosine_rate(self._dot, self._norm, self._gradient)
            case "norm_per_update":
                moved = [after - before for after, before in zip(units.weights(), self._weights)]
                rate = norm_per_update(updated, self._norm, units.norm(moved))
            case "norm_per_decay":
                rate = norm_per_decay(updated, self._norm, initial / steps)
            case "norm_relative":
                rate = norm_relative(updated, self._norm)
        length = relative_length(self._gradient, self.group_of_unit, self.groups)
        correction = 1 - self.settings.smoothing ** age.clamp_min(1)
        self.mean_length = torch.where(
            decaying, self.settings.smoothing * self.mean_length + (1 - self.settings.smoothing) * length, 0.0
        )
        long = self.mean_length > self.settings.length * correction
        if self.settings.criterion == "significance":
            # A plain mean over the decay so far, because a smoothed one has no simple standard error.
            share = 1 / age.clamp_min(1)
            self.mean_rate = torch.where(decaying, self.mean_rate + share * (rate - self.mean_rate), 0.0)
            squares = self.mean_square + share * (rate.square() - self.mean_square)
            self.mean_square = torch.where(decaying, squares, 0.0)
            escapes = significance(self.mean_rate, self.mean_square, age) > self.settings.rate
        else:
            self.mean_rate = torch.where(
                decaying, self.settings.smoothing * self.mean_rate + (1 - self.settings.smoothing) * rate, 0.0
            )
            escapes = self.mean_rate > self.settings.rate * correction
        resists = (escapes & long) if self.settings.combine == "and" else (escapes | long)
        resists &= decaying & (age > (self.settings.start or 0) * steps)
        self.hits = torch.where(resists, self.hits + 1, 0)
        return self.hits >= self.settings.hits

    def select(self, survivors: Tensor) -> None:
        """Keep only the state of these units. survivors: (kept,) indices."""
        for name in STATE:
            setattr(self, name, getattr(self, name)[survivors])

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device, shape = self.group_of_unit.device, self.group_of_unit.shape
        if any(state[name].shape != shape for name in STATE):
            raise ValueError(f"the rectifier's state is not of {len(self.group_of_unit)} units")
        for name in STATE:
            setattr(self, name, state[name].to(device))


STATE = ("mean_rate", "mean_square", "mean_length", "hits")

"""DepGraph (Fang et al., CVPR 2023): group-norm importance with global ranking, and its sparse learning.

Importance: for every layer of a group, Σ w² of the unit's rows, of its columns, or γ²; averaged over the layers;
divided by the group's mean or maximum so that groups can be ranked together. Biases are not counted.

How this differs from the reference implementation: victims of a round are taken from one ranking, where the reference
removes in up to 400 small steps and ranks anew after each; and equal importances within a group give a finite penalty.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.budget import Scores
from dpm_cli.graph import Groups, Role
from dpm_cli.graph.units import rows_of

Normalizer = Literal["mean", "max"]


class GroupNorm:
    """Importances and the sparse-learning gradient of every unit at once. Bind anew after compaction.

    Both sides of a unit count: what makes its values and what reads them (the full group of the paper, §3).
    """

    def __init__(self, groups: Groups, model: nn.Module) -> None:
        counted = (Role.PRODUCER, Role.NORM, Role.CONSUMER)
        parts = [part for part in groups.slices if part.role in counted]
        weights = [model.get_parameter(part.tensor) for part in parts]
        # Depthwise rows are not counted, as in the reference; vectors count only as normalisation weights.
        chosen = [
            (part, weight) for part, weight in zip(parts, weights) if (part.role is Role.NORM) == (weight.dim() == 1)
        ]
        self.parameters = [weight for _, weight in chosen]
        self._axes = [part.axis for part, _ in chosen]
        self.count, self.groups = groups.units, len(groups)
        device = self.parameters[0].device if chosen else torch.device("cpu")
        self._units = [torch.from_numpy(part.units).to(device) for part, _ in chosen]  # each (axis size,)
        self._all_units = torch.cat(self._units) if chosen else torch.zeros(0, dtype=torch.int64)
        self._group_of_unit = torch.from_numpy(groups.group_of_unit).to(device)
        layers = np.zeros(len(groups), np.int64)
        for part, _ in chosen:
            layers[np.unique(groups.group_of_unit[part.units[part.units < groups.units]])] += 1
        self._layers = torch.from_numpy(layers).to(device)[self._group_of_unit].clamp_min(1)  # (units,)

    def importance(self) -> Tensor:
        """(units,) mean over the group's layers of the unit's sum of squares; not normalised."""
        squares = [
            torch.linalg.vector_norm(rows_of(p.detach(), axis), dim=1).square() if p.dim() > 1 else p.detach().square()
            for p, axis in zip(self.parameters, self._axes)
        ]
        sums = torch.zeros(self.count + 1, device=self._all_units.device)
        if squares:
            sums = sums.index_add_(0, self._all_units, torch.cat(squares))
        return sums[: self.count] / self._layers

    def scores(self, normalizer: Normalizer) -> Scores:
        """(units,) importance relative to its group's mean or maximum; low is redundant. Waits for the device."""
        importance = self.importance().double()
        scale = torch.zeros(self.groups, dtype=importance.dtype, device=importance.device)
        scale = scale.scatter_reduce(
            0, self._group_of_unit, importance, "mean" if normalizer == "mean" else "amax", include_self=False
        )
        return (importance / scale.clamp_min(1e-30)[self._group_of_unit]).cpu().numpy()

    @torch.no_grad()
    def penalise_(self, strength: float, alpha: float = 4.0) -> None:
        """Add strength · γ · w to the gradients, γ = 2^(α (s_max − s)/(s_max − s_min)) ∈ [1, 2^α] (DepGraph, eq. 4).

        The weakest unit of a group is pushed hardest. Call between backward and the optimizer's step.
        """
        root = self.importance().sqrt()
        top, bottom = (
            torch.zeros(self.groups, device=root.device).scatter_reduce(
                0, self._group_of_unit, root, extreme, include_self=False
            )[self._group_of_unit]
            for extreme in ("amax", "amin")
        )
        gamma = torch.exp2(alpha * (top - root) / (top - bottom + 1e-8))  # (units,)
        gamma = torch.cat([strength * gamma, gamma.new_zeros(1)])
        with_gradient = [
            (p, p.grad, gamma[units].view([-1 if axis == k else 1 for k in range(p.dim())]))
            for p, axis, units in zip(self.parameters, self._axes, self._units)
            if p.grad is not None
        ]
        for parameter, gradient, factor in with_gradient:
            gradient.addcmul_(parameter, factor.to(parameter.dtype))


class DepGraph:
    """The base pruner `depgraph`: group norms, with or without sparse learning before the first round."""

    def __init__(self, *, normalizer: Normalizer, strength: float) -> None:
        self.normalizer, self.strength = normalizer, strength

    def bind(self, groups: Groups, model: nn.Module) -> None:
        self.norms = GroupNorm(groups, model)

    def penalise_(self) -> None:
        self.norms.penalise_(self.strength)

    def scores(self) -> Scores:
        return self.norms.scores(self.normalizer)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: everything is read from the weights."""

"""DepGraph (Fang et al., CVPR 2023): group-norm importance with global ranking, and its sparse learning.

Importance: for every layer of a group, Σ w² of the unit's rows, of its columns, or γ²; averaged over the layers;
divided by the group's mean or maximum so that groups can be ranked together. Biases are not counted.

How this differs from the reference implementation: victims of a round are taken from one ranking, where the reference
removes in up to 400 small steps and ranks anew after each; and equal importances within a group give a finite penalty.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.budget import Scores
from dpm_cli.graph import Groups, Role, Slice

Normalizer = Literal["mean", "max"]


class GroupNorm:
    """Importances and the sparse-learning gradient of every unit at once. Bind anew after compaction.

    Both sides of a unit count: what makes its values and what reads them (the full group of the paper, §3).
    """

    def __init__(self, groups: Groups, model: nn.Module) -> None:
        counted = (Role.PRODUCER, Role.NORM, Role.CONSUMER)
        axes: dict[str, list[Slice]] = {}
        for part in groups.slices:
            # Depthwise rows are not counted, as in the reference; vectors count only as normalisation weights.
            is_vector = part.role in counted and model.get_parameter(part.tensor).dim() == 1
            if part.role in counted and (part.role is Role.NORM) == is_vector:
                axes.setdefault(part.tensor, []).append(part)
        # Vectors first: they are joined into one tensor before any arithmetic.
        names = sorted(axes, key=lambda name: model.get_parameter(name).dim() > 1)
        parts = [part for name in names for part in axes[name]]
        self.parameters = [model.get_parameter(name) for name in names]
        self._axes = [[part.axis for part in axes[name]] for name in names]
        self._vectors = sum(parameter.dim() == 1 for parameter in self.parameters)
        self._sizes = [len(part.units) for part in parts]
        self.count, self.groups = groups.units, len(groups)
        device = self.parameters[0].device if names else torch.device("cpu")
        units = [torch.from_numpy(part.units) for part in parts] or [torch.zeros(0, dtype=torch.int64)]
        self._units = torch.cat(units).to(device)  # (entries,) every index along every axis -> its unit
        self._group_of_unit = torch.from_numpy(groups.group_of_unit).to(device)
        layers = np.zeros(len(groups), np.int64)
        for part in parts:
            layers[np.unique(groups.group_of_unit[part.units[part.units < groups.units]])] += 1
        self._layers = torch.from_numpy(layers).to(device)[self._group_of_unit].clamp_min(1)  # (units,)

    def importance(self) -> Tensor:
        """(units,) mean over the group's layers of the unit's sum of squares; not normalised."""
        weights = [parameter.detach() for parameter in self.parameters]
        vectors, matrices = weights[: self._vectors], weights[self._vectors :]
        squares = [torch.cat(vectors).square()] if vectors else []
        for weight, axes in zip(matrices, self._axes[self._vectors :]):
            squares += _sums_along(weight.square(), axes)
        sums = torch.zeros(self.count + 1, device=self._units.device)
        if squares:
            sums = sums.index_add_(0, self._units, torch.cat(squares))
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
        factors = iter(torch.split(gamma[self._units], self._sizes))
        for parameter, axes in zip(self.parameters, self._axes):
            # A weight that makes one unit and reads another is pushed by both at once.
            shapes = [[-1 if axis == k else 1 for k in range(parameter.dim())] for axis in axes]
            factor = reduce(torch.add, [next(factors).view(shape) for shape in shapes])
            if parameter.grad is not None:
                parameter.grad.addcmul_(parameter, factor.to(parameter.dtype))


def _sums_along(squares: Tensor, axes: Sequence[int]) -> list[Tensor]:
    """Sums over all axes but one, for each of `axes`; the tensor is read once."""
    if squares.dim() > 2 and max(axes) < 2:
        squares = squares.sum(tuple(range(2, squares.dim())))
    return [squares.sum([k for k in range(squares.dim()) if k != axis]) for axis in axes]


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

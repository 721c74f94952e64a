"""DepGraph (Fang et al., CVPR 2023): group-norm importance with global ranking, and its sparse learning.

Importance: for every layer of a group, Σ w² of the unit's rows, of its columns, or γ²; averaged over the layers;
divided by the group's mean or maximum so that groups can be ranked together. Biases are not counted.

How this differs from the reference implementation: victims of a round are taken from one ranking, where the reference
removes in up to 400 small steps and ranks anew after each; and equal importances within a group give a finite penalty.
"""

from collections.abc import Iterator, Mapping, Sequence
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
        slices: dict[str, list[Slice]] = {}
        for part in groups.slices:
            # Depthwise rows are not counted, as in the reference; vectors count only as normalisation weights.
            is_vector = part.role in counted and model.get_parameter(part.tensor).dim() == 1
            if part.role in counted and (part.role is Role.NORM) == is_vector:
                slices.setdefault(part.tensor, []).append(part)
        batches = list(_batches(slices, model))
        self._stacks = [
            Stack([model.get_parameter(name) for name in names], [part.axis for part in slices[names[0]]])
            for names in batches
        ]
        parts = [
            part for names in batches for same_axis in zip(*(slices[name] for name in names)) for part in same_axis
        ]
        self.count, self.groups = groups.units, len(groups)
        device = self._stacks[0].parameters[0].device if self._stacks else torch.device("cpu")
        units = [torch.from_numpy(part.units) for part in parts] or [torch.zeros(0, dtype=torch.int64)]
        self._units = torch.cat(units).to(device)  # (entries,) every index along every axis -> its unit
        self._group_of_unit = torch.from_numpy(groups.group_of_unit).to(device)
        layers = np.zeros(len(groups), np.int64)
        for part in parts:
            layers[np.unique(groups.group_of_unit[part.units[part.units < groups.units]])] += 1
        self._layers = torch.from_numpy(layers).to(device)[self._group_of_unit].clamp_min(1)  # (units,)

    def importance(self) -> Tensor:
        """(units,) mean over the group's layers of the unit's sum of squares; not normalised."""
        return self._importance([stack.weights() for stack in self._stacks])

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
        weights = [stack.weights() for stack in self._stacks]
        root = self._importance(weights).sqrt()
        top, bottom = (
            torch.zeros(self.groups, device=root.device).scatter_reduce(
                0, self._group_of_unit, root, extreme, include_self=False
            )[self._group_of_unit]
            for extreme in ("amax", "amin")
        )
        gamma = torch.exp2(alpha * (top - root) / (top - bottom + 1e-8))  # (units,)
        gamma = torch.cat([strength * gamma, gamma.new_zeros(1)])
        factors = iter(torch.split(gamma[self._units], [size for stack in self._stacks for size in stack.sizes]))
        for stack, weight in zip(self._stacks, weights):
            stack.push_(weight, [next(factors) for _ in stack.sizes])

    def _importance(self, weights: Sequence[Tensor]) -> Tensor:
        sums = torch.zeros(self.count + 1, device=self._units.device)
        if weights:
            squares = [part for stack, weight in zip(self._stacks, weights) for part in stack.sums(weight.square())]
            sums = sums.index_add_(0, self._units, torch.cat(squares))
        return sums[: self.count] / self._layers


STACKED = 1 << 18  # entries of a stack; to copy more costs more than the kernels that it saves


def _batches(slices: Mapping[str, Sequence[Slice]], model: nn.Module) -> Iterator[list[str]]:
    """Names of what one `Stack` may hold: all vectors, and some tensors of the same shape and axes."""
    alike: dict[object, list[str]] = {}
    for name, parts in slices.items():
        parameter = model.get_parameter(name)
        shape = parameter.shape if parameter.dim() > 1 else None
        alike.setdefault((parameter.dtype, shape, tuple(part.axis for part in parts)), []).append(name)
    for names in alike.values():
        size = max(1, STACKED // model.get_parameter(names[0]).numel())
        yield from (names[first : first + size] for first in range(0, len(names), size))


class Stack:
    """Some parameters of one shape, end to end along their first axis, so that one kernel takes them all; or vectors
    of any length.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], axes: Sequence[int]) -> None:
        """axes: of each parameter, those whose indices belong to units."""
        self.parameters, self.axes = list(parameters), list(axes)
        self.sizes = [sum(parameter.shape[axis] for parameter in parameters) for axis in axes]
        self._rows = [len(parameter) for parameter in parameters]

    def weights(self) -> Tensor:
        """(sum of rows, …), a copy if there are several; in the memory format of the parameters."""
        tensors = [parameter.detach() for parameter in self.parameters]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    def sums(self, entries: Tensor) -> list[Tensor]:
        """For each axis the sums over all others, (its size in all parameters,); the tensor is read once."""
        if entries.dim() > 2 and max(self.axes) < 2:
            entries = entries.sum(tuple(range(2, entries.dim())))
        if entries.dim() == 1:
            return [entries]
        each = self._apart(entries)  # (B, rows, columns, …)
        return [each.sum([k for k in range(1, each.dim()) if k != axis + 1]).flatten() for axis in self.axes]

    def push_(self, weights: Tensor, factors: Sequence[Tensor]) -> None:
        """Add to each gradient its weight times a factor per index of each axis, as long as in `sums`.

        A weight that makes one unit and reads another is pushed by both at once. Uses `weights` up.
        """
        each = weights if weights.dim() == 1 else self._apart(weights)
        shapes = [[size if k in (0, axis + 1) else 1 for k, size in enumerate(each.shape)] for axis in self.axes]
        factor = reduce(torch.add, [values.view(shape) for values, shape in zip(factors, shapes)]).to(each.dtype)
        if len(self.parameters) == 1:
            if (gradient := self.parameters[0].grad) is not None:
                gradient.addcmul_(weights, factor.view(factor.shape[-weights.dim() :]))
            return
        each.mul_(factor)
        pushes = [
            (p.grad, push) for p, push in zip(self.parameters, torch.split(weights, self._rows)) if p.grad is not None
        ]
        if pushes:
            torch._foreach_add_([gradient for gradient, _ in pushes], [push for _, push in pushes])

    def _apart(self, tensor: Tensor) -> Tensor:
        """(sum of rows, …) -> (B, rows, …)"""
        return tensor.view(len(self.parameters), -1, *tensor.shape[1:])


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

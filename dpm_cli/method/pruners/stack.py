"""Process many small parameters with few kernels: launching one costs as much as thousands of entries."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from dpm_cli.graph import Slice

STACKED = 1 << 18  # maximum entries of a stack; a copy of 1 MB stays in a core's cache


def stackable(slices: Mapping[str, Sequence[Slice]], model: nn.Module) -> Iterator[list[str]]:
    """Yield names that one `Stack` may hold: all vectors, or some tensors of the same shape and axes."""
    alike: dict[object, list[str]] = {}
    for name, parts in slices.items():
        parameter = model.get_parameter(name)
        shape = parameter.shape if parameter.dim() > 1 else None
        alike.setdefault((parameter.dtype, shape, tuple(part.axis for part in parts)), []).append(name)
    for names in alike.values():
        size = max(1, STACKED // model.get_parameter(names[0]).numel())
        yield from (names[first : first + size] for first in range(0, len(names), size))


class Stack:
    """Joins parameters of one shape, or vectors of any length, along their first axis for a single kernel."""

    def __init__(self, parameters: Sequence[nn.Parameter], axes: Sequence[int]) -> None:
        """axes: the axes of each parameter whose indices belong to units."""
        self.parameters, self.axes = list(parameters), list(axes)
        self.sizes = [sum(parameter.shape[axis] for parameter in parameters) for axis in axes]
        self._rows = [len(parameter) for parameter in parameters]

    def sums(self, power: Literal[1, 2]) -> list[Tensor]:
        """Sum |w|^power over all other axes, for each axis: (total size of the axis over all parameters,)."""
        tensors = [parameter.detach() for parameter in self.parameters]
        weights = torch.cat(tensors) if len(tensors) > 1 else tensors[0]  # (sum of rows, …)
        copy = weights if len(tensors) > 1 else None
        entries = torch.abs(weights, out=copy) if power == 1 else torch.square(weights, out=copy)
        if entries.dim() > 2 and max(self.axes) < 2:
            entries = entries.sum(tuple(range(2, entries.dim())))
        if entries.dim() == 1:
            return [entries]
        each = entries.view(len(tensors), -1, *entries.shape[1:])  # (B, rows, columns, …)
        return [each.sum([k for k in range(1, each.dim()) if k != axis + 1]).flatten() for axis in self.axes]

    def pull_(self, factors: Sequence[Tensor]) -> None:
        """Add to each gradient its weight times a factor per index of each axis, sized as in `sums`.

        A weight that produces one unit and reads another is pulled by both.
        """
        first, count = self.parameters[0], len(self.parameters)
        if first.dim() == 1:
            (values,) = factors
            each = torch.split(values.to(first.dtype), self._rows)
        else:
            sides = [
                values.view(count, *(size if k == axis else 1 for k, size in enumerate(first.shape)))
                for axis, values in zip(self.axes, factors)
            ]
            each = reduce(torch.add, sides).to(first.dtype).unbind()
        pulled = [(p.grad, p.detach(), factor) for p, factor in zip(self.parameters, each) if p.grad is not None]
        if pulled:
            torch._foreach_addcmul_(*(list(tensors) for tensors in zip(*pulled)))

"""Many small parameters taken by few kernels: a kernel's start costs as much as thousands of entries."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from dpm_cli.graph import Slice

STACKED = 1 << 18  # entries of a stack; to copy more costs more than the kernels that it saves


def stackable(slices: Mapping[str, Sequence[Slice]], model: nn.Module) -> Iterator[list[str]]:
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

    def pull_(self, weights: Tensor, factors: Sequence[Tensor]) -> None:
        """Add to each gradient its weight times a factor per index of each axis, as long as in `sums`.

        A weight that makes one unit and reads another is pulled by both at once. Uses `weights` up.
        """
        each = weights if weights.dim() == 1 else self._apart(weights)
        shapes = [[size if k in (0, axis + 1) else 1 for k, size in enumerate(each.shape)] for axis in self.axes]
        factor = reduce(torch.add, [values.view(shape) for values, shape in zip(factors, shapes)]).to(each.dtype)
        if len(self.parameters) == 1:
            if (gradient := self.parameters[0].grad) is not None:
                gradient.addcmul_(weights, factor.view(factor.shape[-weights.dim() :]))
            return
        each.mul_(factor)
        pulls = [
            (p.grad, pull) for p, pull in zip(self.parameters, torch.split(weights, self._rows)) if p.grad is not None
        ]
        if pulls:
            torch._foreach_add_([gradient for gradient, _ in pulls], [pull for _, pull in pulls])

    def _apart(self, tensor: Tensor) -> Tensor:
        """(sum of rows, …) -> (B, rows, …)"""
        return tensor.view(len(self.parameters), -1, *tensor.shape[1:])

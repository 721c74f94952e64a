"""The three reductions over all units at once that every training step needs: norm, dot, scale."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from dpm_cli.graph.groups import Groups


class Units:
    """The producer side (rows, biases, norm weights and biases) of all units of one model, as live tensors.

    A few kernels per parameter tensor and a handful for the whole model; no loop over channels and no synchronisation.
    Bind anew after `compact_`, which replaces the parameters.
    """

    def __init__(self, groups: Groups, model: nn.Module, only: Collection[str] | None = None) -> None:
        """only: names of parameters; without it, all of the producer side."""
        parts = [part for part in groups.slices if part.role.is_scaled and (only is None or part.tensor in only)]
        # Vectors first: they are joined into one tensor before any arithmetic.
        self.parameters = [model.get_parameter(part.tensor) for part in parts]
        order = sorted(range(len(parts)), key=lambda i: self.parameters[i].dim() > 1)
        parts, self.parameters = [parts[i] for i in order], [self.parameters[i] for i in order]
        self.names = [part.tensor for part in parts]
        self.count = groups.units
        self._axes = [part.axis for part in parts]
        self._vectors = sum(parameter.dim() == 1 for parameter in self.parameters)
        self._sizes = [len(part.units) for part in parts]
        self.device = self.parameters[0].device if parts else torch.device("cpu")
        self._units = torch.cat(
            [torch.from_numpy(part.units) for part in parts] or [torch.zeros(0, dtype=torch.int64)]
        ).to(self.device)  # (entries,) every index along every axis -> its unit, `count` for those that always stay

    def weights(self) -> list[Tensor]:
        """The parameters themselves, detached."""
        return [parameter.detach() for parameter in self.parameters]

    def gradients(self) -> list[Tensor]:
        """Their gradients; zeros where a parameter has none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters]

    def norm(self, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """(units,) L2 norm of each unit's producer entries, in `tensors` shaped like the parameters (or in them)."""
        tensors = self.weights() if tensors is None else tensors
        norms = [torch.linalg.vector_norm(_rows(t, axis), dim=1) for t, axis in self._matrices(tensors)]
        return self._per_unit(self._joined(tensors, norms).square()).sqrt()

    def dot(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """(units,) inner product of each unit's entries in two lists of tensors shaped like the parameters."""
        products = [
            (_rows(a, axis) * _rows(b, axis)).sum(1)
            for (a, axis), (b, _) in zip(self._matrices(left), self._matrices(right))
        ]
        vectors = self._joined_vectors(left) * self._joined_vectors(right)
        return self._per_unit(torch.cat([vectors, *products]))

    def total(self, tensors: Sequence[Tensor]) -> Tensor:
        """(units,) sum of each unit's entries in tensors shaped like the parameters."""
        sums = [_rows(tensor, axis).sum(1) for tensor, axis in self._matrices(tensors)]
        return self._per_unit(self._joined(tensors, sums))

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Multiply each unit's entries by its factor; exactly 1 leaves the bits alone. factor: (units,)"""
        if self.parameters:
            torch._foreach_mul_(self.weights(), self.spread(factor, rest=1.0))

    @torch.no_grad()
    def add_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        """Add to each unit's entries its factor times those of `tensors`, shaped like the parameters.

        factor: (units,)
        """
        if self.parameters:
            torch._foreach_addcmul_(self.weights(), list(tensors), self.spread(factor, rest=0.0))

    def entries(self) -> Tensor:
        """(units,) how many scalars each unit owns on its producer side."""
        return self.dot(*([[torch.ones_like(p) for p in self.parameters]] * 2))

    def spread(self, values: Tensor, *, rest: float) -> list[Tensor]:
        """One per parameter, to be broadcast over it: its units' values. rest: for entries that always stay."""
        spread = torch.cat([values, values.new_full((1,), rest)])[self._units]
        return [
            part.view([-1 if axis == k else 1 for k in range(p.dim())]).to(p.dtype)
            for part, p, axis in zip(torch.split(spread, self._sizes), self.parameters, self._axes)
        ]

    def _matrices(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        return list(zip(tensors[self._vectors :], self._axes[self._vectors :]))

    def _joined_vectors(self, tensors: Sequence[Tensor]) -> Tensor:
        vectors = list(tensors[: self._vectors])
        return torch.cat(vectors) if vectors else torch.zeros(0, device=self.device)

    def _joined(self, tensors: Sequence[Tensor], rows: list[Tensor]) -> Tensor:
        return torch.cat([self._joined_vectors(tensors), *rows])

    def _per_unit(self, entries: Tensor) -> Tensor:
        """Sum entries of one unit. entries: (entries,) -> (units,)"""
        sums = entries.new_zeros(self.count + 1).index_add_(0, self._units, entries)
        return sums[: self.count]


def _rows(tensor: Tensor, axis: int) -> Tensor:
    """(size, rest) without a copy for the usual layouts. The order within a row does not matter here."""
    tensor = tensor.movedim(axis, 0)
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.permute(0, 2, 3, 1).is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten(1)

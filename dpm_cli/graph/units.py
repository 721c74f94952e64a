"""Reduce over all units at once: the norms, inner products and scalings that every training step needs."""

from collections.abc import Collection, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from dpm_cli.graph.groups import Groups


class Units:
    """The producer side (rows, biases, norm weights and biases) of all units of one model, as live tensors.

    A few kernels per parameter tensor and a handful for the whole model; no loop over channels and no synchronisation.
    Make a new one after `compact_`, which replaces the parameters.

        units = Units(groups, model)
        units.norm()  # (units,)
        units.scale_(factor)  # factor: (units,); a unit is exactly zero after a factor of 0
    """

    def __init__(
        self, groups: Groups, model: nn.Module, only: Collection[str] | None = None, *, joined: bool | None = None
    ) -> None:
        """Find the parameters in the model. only: names of those to use instead of the whole producer side.

        joined: whether parameters of one shape share their kernels, as they do by default on a GPU, where launching one
        takes longer than a copy. On a CPU the copies would take longer.
        """
        parts = [part for part in groups.slices if part.role.is_scaled and (only is None or part.tensor in only)]
        self.parameters: list[Tensor] = [model.get_parameter(part.tensor) for part in parts]
        self.device = self.parameters[0].device if parts else torch.device("cpu")
        self.joined = self.device.type != "cpu" if joined is None else joined
        # Vectors first: they are joined into one tensor before any arithmetic.
        kinds = [
            _kind(p, part.axis) if self.joined or p.dim() == 1 else (1,) for p, part in zip(self.parameters, parts)
        ]
        order = sorted(range(len(parts)), key=lambda i: (self.parameters[i].dim() > 1, kinds.index(kinds[i])))
        parts, self.parameters = [parts[i] for i in order], [self.parameters[i] for i in order]
        self.names = [part.tensor for part in parts]
        # What shrinks along two axes is scaled once after the other: kernels over several tensors assume distinct ones.
        turns = [self.names[:i].count(name) for i, name in enumerate(self.names)]
        self._apart = [[i for i, turn in enumerate(turns) if turn == now] for now in sorted(set(turns))]
        self.count = groups.units
        self._axes = [part.axis for part in parts]
        self._vectors = sum(parameter.dim() == 1 for parameter in self.parameters)
        self._sizes = [len(part.units) for part in parts]
        self._shapes = [
            [-1 if axis == k else 1 for k in range(p.dim())] for p, axis in zip(self.parameters, self._axes)
        ]  # a vector along its axis, to be broadcast over the parameter
        alike = [[*same] for _, same in groupby(range(self._vectors, len(parts)), key=lambda i: kinds[order[i]])]
        self._piles = [(same[0], len(same)) for same in alike] if self.joined else []  # first parameter, count
        self._blocks: list[Tensor] = []  # (count, …) factors of a pile, laid out as its parameters
        self._units = torch.cat(
            [torch.from_numpy(part.units) for part in parts] or [torch.zeros(0, dtype=torch.int64)]
        ).to(self.device)  # (entries,) every index along every axis -> its unit, `count` for those that always stay

    def weights(self) -> list[Tensor]:
        """Return the parameters themselves, detached."""
        return [parameter.detach() for parameter in self.parameters]

    def gradients(self) -> list[Tensor]:
        """Return the gradients; zeros where a parameter has none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    @torch.no_grad()
    def norm(self, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """Return the L2 norm of each unit's entries: (units,).

        tensors: shaped like the parameters, which are the default.
        """
        tensors = self.parameters if tensors is None else tensors
        norms = [torch.linalg.vector_norm(rows, dim=1) for rows in self._matrices(tensors)]
        return self._norms([self._joined_vectors(tensors), *norms])

    def dot(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """Return the inner product of each unit's entries in two lists shaped like the parameters: (units,)."""
        return self.compare(left, right)[1]

    @torch.no_grad()
    def compare(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the norms of `left` and its inner products with `right`, both (units,), reading memory once."""
        a, b = self._joined_vectors(left), self._joined_vectors(right)
        norms, products = [a], [a * b]
        for a, b in zip(self._matrices(left), self._matrices(right)):
            # The second read is free if the first one is still in the core's cache. A GPU wants few, large kernels.
            height = max(1, CACHED // max(a.shape[1], 1)) if a.device.type == "cpu" else len(a)
            for x, y in zip(torch.split(a, height), torch.split(b, height)) if height < len(a) else ((a, b),):
                norms.append(torch.linalg.vector_norm(x, dim=1))
                products.append((x * y).sum(1))
        return self._norms(norms), self._per_unit(torch.cat(products))

    def total(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sum each unit's entries in tensors shaped like the parameters: (units,)."""
        sums = [rows.sum(1) for rows in self._matrices(tensors)]
        return self._per_unit(torch.cat([self._joined_vectors(tensors), *sums]))

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        """Multiply each unit's entries by its factor; exactly 1 leaves the bits alone. factor: (units,)"""
        if self.parameters:
            factors = self._laid_out(factor, rest=1.0)
            for chosen in self._apart:
                torch._foreach_mul_([self.parameters[i] for i in chosen], [factors[i] for i in chosen])

    @torch.no_grad()
    def add_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        """Add to each unit's entries its factor times those of `tensors`, shaped like the parameters.

        factor: (units,)
        """
        if self.parameters:
            factors = self._laid_out(factor, rest=0.0)
            for chosen in self._apart:
                to, added, times = ([each[i] for i in chosen] for each in (self.parameters, tensors, factors))
                torch._foreach_addcmul_(to, added, times)

    def entries(self) -> Tensor:
        """Count the scalars that each unit owns on its producer side: (units,)."""
        return self.dot(*([[torch.ones_like(p) for p in self.parameters]] * 2))

    def spread(self, values: Tensor, *, rest: float) -> list[Tensor]:
        """Return one tensor per parameter that gives every index its unit's value, ready to broadcast.

        values: (units,). rest: the value for entries that always stay.
        """
        spread = torch.cat([values, values.new_full((1,), rest)])[self._units]
        return [
            part.view(shape).to(p.dtype)
            for part, shape, p in zip(torch.split(spread, self._sizes), self._shapes, self.parameters)
        ]

    def _laid_out(self, values: Tensor, *, rest: float) -> list[Tensor]:
        """Return `spread`; if kernels are shared, with the shapes and strides of the parameters, which that takes."""
        if not self._piles:
            return self.spread(values, rest=rest)
        first = [self.parameters[i] for i, _ in self._piles]
        if [block.stride()[1:] for block in self._blocks] != [p.stride() for p in first]:
            self._blocks = [
                torch.empty_strided((count, *p.shape), (p.numel(), *p.stride()), dtype=p.dtype, device=p.device)
                for p, (_, count) in zip(first, self._piles)
            ]
        spread = torch.cat([values, values.new_full((1,), rest)])[self._units]
        sizes = [sum(self._sizes[i : i + count]) for i, count in self._piles]
        vectors, *piles = torch.split(spread, [sum(self._sizes[: self._vectors]), *sizes])
        for block, entries, (i, count) in zip(self._blocks, piles, self._piles):
            block.copy_(entries.view(count, *self._shapes[i]))  # each index's factor, over all its entries
        factors = [factor for block in self._blocks for factor in block.unbind()]
        return [*torch.split(vectors, self._sizes[: self._vectors]), *factors]

    def _matrices(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Reshape all tensors but vectors to one row per index: (size, rest). Piles are joined."""
        matrices = slice(self._vectors, None)
        rows = [_rows(*each) for each in zip(tensors[matrices], self._axes[matrices], self.parameters[matrices])]
        if not self._piles:
            return rows
        starts = [(first - self._vectors, count) for first, count in self._piles]
        return [torch.cat(rows[first : first + count]) if count > 1 else rows[first] for first, count in starts]

    def _joined_vectors(self, tensors: Sequence[Tensor]) -> Tensor:
        vectors = list(tensors[: self._vectors])
        return torch.cat(vectors) if vectors else torch.zeros(0, device=self.device)

    def _norms(self, norms: Sequence[Tensor]) -> Tensor:
        """Combine norms of rows, (entries,) in parts, into norms of units: (units,)."""
        return self._per_unit(torch.cat(list(norms)).square()).sqrt()

    def _per_unit(self, entries: Tensor) -> Tensor:
        """Sum entries of one unit. entries: (entries,) -> (units,)"""
        sums = entries.new_zeros(self.count + 1).index_add_(0, self._units, entries)
        return sums[: self.count]


CACHED = 1 << 18  # entries that are read at once: 1 MB


def _kind(parameter: Tensor, axis: int) -> tuple[object, ...]:
    """Say which matrices can be joined: those of one shape whose rows belong to units along the same axis."""
    if parameter.dim() == 1:
        return (parameter.dtype,)
    return parameter.dtype, parameter.shape, axis, parameter.is_contiguous()


def _rows(tensor: Tensor, axis: int, like: Tensor) -> Tensor:
    """Reshape to (size, rest), without a copy for the usual layouts.

    The order within a row is that of `like` in memory.
    """
    if axis == 0 and tensor.dim() == 4 and not like.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return (tensor.movedim(axis, 0) if axis else tensor).flatten(1)

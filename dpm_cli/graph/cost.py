"""Predict the exact MACs and parameters of any set of survivors from one traced graph, without the model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from dpm_cli.graph.labels import CostTerm, Flags, Ids


@dataclass(frozen=True)
class Terms:
    """Sums of products: coefficient x the surviving sizes of its factors."""

    coefficients: Ids  # (terms,)
    factors: Ids  # (terms, factors) rows of the size table; shorter products are padded with its last row, which is 1

    def total(self, sizes: Ids) -> int:
        """Sum all products for a table of surviving sizes."""
        return int((self.coefficients * sizes[self.factors].prod(1)).sum())


@dataclass(frozen=True)
class Cost:
    """MACs of one input, and parameters, as functions of which units survive."""

    fixed: Ids  # (sizes,) indices of each axis that belong to no unit
    incidence: Any  # csr (sizes, units): how many indices of each axis every unit owns
    mac_terms: Terms
    parameter_terms: Terms
    batch: int
    parameter_names: tuple[str, ...] = ()  # of the first parameter terms, in order
    parameter_axes: tuple[tuple[int, ...], ...] = ()  # of each of these: the axes that its factors are

    def macs(self, alive: Flags) -> int:
        """Count the MACs of one input. alive: (units,)"""
        return self.mac_terms.total(self.sizes(alive)) // self.batch

    def parameters(self, alive: Flags) -> int:
        """Count the parameters. alive: (units,)"""
        return self.parameter_terms.total(self.sizes(alive))

    def sizes(self, alive: Flags) -> Ids:
        """Return the table of surviving sizes, by row. alive: (units,)"""
        owned: npt.NDArray[np.int64] = self.incidence @ alive.astype(np.int64)
        return self.fixed + owned

    def survivors(self, alive: Flags) -> "Cost":
        """Return the cost of the compacted network, as a function of its own units. alive: (units,)"""
        return replace(self, incidence=self.incidence[:, np.flatnonzero(alive)])


def build_cost(
    mac_terms: Sequence[CostTerm],
    parameter_terms: Sequence[CostTerm],
    unit_of_label: Ids,
    units: int,
    batch: int,
    parameter_axes: Mapping[str, Sequence[int]],
) -> Cost:
    """Collect cost terms into tables that are cheap to evaluate.

    unit_of_label: (labels,) the unit of every label, -1 for labels that always stay. parameter_axes: of the parameters
    of the first terms, in order, the axes that their factors are.
    """
    table: dict[bytes, int] = {}
    axes: list[Ids] = []

    def row(ids: Ids) -> int:
        key = ids.tobytes()
        if key not in table:
            table[key] = len(axes)
            axes.append(ids)
        return table[key]

    mac_rows = [[row(ids) for ids in term.factors] for term in mac_terms]
    parameter_rows = [[row(ids) for ids in term.factors] for term in parameter_terms]
    owners = [unit_of_label[ids] for ids in axes]
    fixed = np.array([*(int((owner < 0).sum()) for owner in owners), 1], np.int64)  # the last row is the constant 1
    indptr = np.concatenate([[0], np.cumsum([int((owner >= 0).sum()) for owner in owners]), [0]]).astype(np.int64)
    indptr[-1] = indptr[-2]
    indices = np.concatenate([owner[owner >= 0] for owner in owners] or [np.zeros(0, np.int64)])
    incidence = csr_matrix((np.ones(len(indices), np.int64), indices, indptr), shape=(len(fixed), units))
    incidence.sum_duplicates()
    one = len(fixed) - 1
    return Cost(
        fixed,
        incidence,
        _terms((term.coefficient for term in mac_terms), mac_rows, one),
        _terms((term.coefficient for term in parameter_terms), parameter_rows, one),
        batch,
        tuple(parameter_axes),
        tuple(tuple(axes) for axes in parameter_axes.values()),
    )


def parameter_term(shape: Sequence[int], axes: dict[int, Ids]) -> CostTerm:
    """Count the entries of a parameter: fixed axes give a number, labelled axes are factors."""
    return CostTerm(math.prod(size for axis, size in enumerate(shape) if axis not in axes), tuple(axes.values()))


def _terms(coefficients: Iterable[int], rows: list[list[int]], one: int) -> Terms:
    width = max((len(row) for row in rows), default=1) or 1
    padded = [row + [one] * (width - len(row)) for row in rows]
    return Terms(np.array(list(coefficients), np.int64), np.array(padded, np.int64).reshape(-1, width))

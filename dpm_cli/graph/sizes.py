"""Sizes in the code of layers: numbers that attributes hold, and sizes that calls ask for.

Both count something that may be lost, and must follow. What they count are labels while the graph is walked, units
once the ties are solved.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dpm_cli.layers.requests import Request

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Counts = Literal["heads", "width", "parts"]


@dataclass(frozen=True)
class Number:
    """A number, or a list of numbers, that a layer's code may hold because it counts some labels or units."""

    layer: str
    parts: tuple[Ids, ...]  # of each number: what it counts
    counts: Counts = "parts"


@dataclass(frozen=True)
class Size:
    """A size that is asked for along an axis of a result, or of a part."""

    axis: int
    asked: int
    counted: Ids | None  # None if it is fixed
    source: int  # the axis of the tensor that it is made of

    def left(self, stays: Flags) -> int:
        """Return the size that is left."""
        return self.asked if self.counted is None else int(stays[self.counted].sum())


class Merged(NamedTuple):
    """An axis of a result that holds all that one or several axes of the tensor held."""

    axis: int
    first: int
    last: int


@dataclass(frozen=True)
class Asking:
    """A call in a layer's code that asks for sizes: a view, an expansion, a split."""

    layer: str
    rank: int  # of the tensor
    sizes: tuple[tuple[int, Ids], ...]  # what axes of the tensor count, each index another
    after_rank: int  # of the result; 0 for a split
    asked: tuple[Size, ...]  # along axes of the result; of the parts of a split
    merged: tuple[Merged, ...] = ()

    def counting(self, number: Callable[[Ids], Ids]) -> "Asking":
        """Return the same call, counting units instead of labels, or other units."""
        asked = (size if size.counted is None else replace(size, counted=number(size.counted)) for size in self.asked)
        return replace(self, sizes=tuple((axis, number(ids)) for axis, ids in self.sizes), asked=tuple(asked))

    def without_fixed(self, units: int) -> "Asking":
        """Leave out axes that lose none of the units: their sizes may be those of a batch or a picture."""
        lose = {axis for axis, ids in self.sizes if (ids < units).any()}
        lose |= {size.source for size in self.asked if size.counted is not None and (size.counted < units).any()}
        return replace(
            self,
            sizes=tuple((axis, ids) for axis, ids in self.sizes if axis in lose),
            asked=tuple(size for size in self.asked if size.source in lose),
            merged=tuple(part for part in self.merged if lose & set(range(part.first, part.last + 1))),
        )

    def counted(self) -> Ids:
        """Return all that is counted."""
        asked = [size.counted for size in self.asked if size.counted is not None]
        return np.unique(np.concatenate([*(ids for _, ids in self.sizes), *asked, np.zeros(0, np.int64)]))

    def request(self, stays: Flags) -> Request:
        """Return the call with the sizes that are left. stays: flags of what is counted."""
        return Request(
            self.rank,
            tuple((axis, int(stays[ids].sum())) for axis, ids in self.sizes),
            self.after_rank,
            tuple((size.axis, size.asked, size.left(stays)) for size in self.asked),
            tuple((part.axis, part.first, part.last) for part in self.merged),
        )

"""Answer code that asks for the sizes that a layer was built with.

`x.reshape(B, N, self.num_heads, C // self.num_heads)`, `x.view(-1, 16 * 5 * 5)`, `x.split(self.width, 1)`: such code
breaks once channels are lost, though nothing but the number is wrong. The analysis knows what each of these numbers
counts. A layer whose code asks for one gets a subclass of its class with the same parameters, whose forward puts the
number that is left in its place; a layer becomes one in place when it is compacted, or rebuilt from a slim file.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HELD_AS = "size_requests"  # the attribute of a layer that answers, and its name among the edits of a slim file
MOST = 1 << 31


@dataclass(frozen=True)
class Request:
    """One call that asks for sizes: on which tensors it is made, what it asks for, and what is left.

    Of a view, `asked` are axes of its result, and so are `merged`, which hold several axes of the tensor. A split has
    no `after_rank`, and asks for the sizes of its parts.
    """

    rank: int  # of the tensor
    sizes: tuple[tuple[int, int], ...]  # (axis, size) of the tensor, where channels can be lost
    after_rank: int  # of the result; 0 for a split
    asked: tuple[tuple[int, int, int], ...]  # (axis or part, size asked for, size left): both equal if it is fixed
    merged: tuple[tuple[int, int, int], ...] = ()  # (axis, the first and the last axis of the tensor that it holds)

    @property
    def needs_answer(self) -> bool:
        """Tell whether what it asks for may differ from what is left."""
        return bool(self.merged) or any(asked != left for _, asked, left in self.asked)

    def is_made_on(self, x: Tensor) -> bool:
        """Tell whether this may be the tensor that the call is made on."""
        return x.dim() == self.rank and all(_equal(x.shape[axis], size) for axis, size in self.sizes)

    def view(self, x: Tensor, shape: Sequence[Any]) -> list[Any] | None:
        """Return the shape that is meant; None if this is another call. -1 stays."""
        lost = [(axis, asked) for axis, asked, left in self.asked if asked != left]
        if len(shape) != self.after_rank or any(not _equal(shape[axis], asked, -1) for axis, asked in lost):
            return None
        meant = {axis: left for axis, _, left in self.asked}
        meant |= {axis: math.prod(x.shape[first : last + 1]) for axis, first, last in self.merged}
        return [size if _equal(size, -1) else meant.get(axis, size) for axis, size in enumerate(shape)]

    def parts(self, sizes: Any) -> list[int] | None:
        """Return the sizes of the parts that are meant; None if this is another call."""
        asked, left = [old for _, old, _ in self.asked], [new for _, _, new in self.asked]
        is_meant = sizes == asked[0] == max(asked) if isinstance(sizes, int) else list(sizes) == asked
        return left if is_meant else None


class Answering:
    """The part that all classes share which `answer_` makes."""

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _empty, (type(self).__mro__[2],), vars(self)


_classes: dict[type[nn.Module], Any] = {}


def _answering_class(kind: type[nn.Module]) -> Any:
    if kind not in _classes:

        @wraps(kind.forward)  # exporters read its signature
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with _Answers(vars(self)[HELD_AS]):
                return kind.forward(self, *args, **kwargs)

        attributes = {"__module__": __name__, "__doc__": kind.__doc__, "forward": forward}
        _classes[kind] = type(f"Slim{kind.__name__}", (Answering, kind), attributes)
    return _classes[kind]


def _empty(kind: type[nn.Module]) -> Any:
    made = _answering_class(kind)
    return made.__new__(made)


def answer_(layer: nn.Module, requests: Iterable[Request]) -> None:
    """Let a layer's code go on asking for the sizes that it was built with."""
    requests = tuple(requests)
    if requests and not isinstance(layer, Answering):
        layer.__class__ = _answering_class(type(layer))
    if requests:
        vars(layer)[HELD_AS] = requests


def requests_of(layer: nn.Module) -> tuple[Request, ...]:
    """Return what the code of a layer asks for that is answered; nothing for a layer that is as it was built."""
    return vars(layer).get(HELD_AS, ()) if isinstance(layer, Answering) else ()


def class_as_built(layer: nn.Module) -> type[nn.Module]:
    """Return the class that a layer had before it began to answer."""
    return type(layer).__mro__[2] if isinstance(layer, Answering) else type(layer)


def encode(requests: Iterable[Request]) -> list[int]:
    """Turn requests into plain numbers."""
    numbers = []
    for request in requests:
        lists = (request.sizes, request.asked, request.merged)
        numbers += [request.rank, request.after_rank, *map(len, lists)]
        numbers += [number for rows in lists for row in rows for number in row]
    return numbers


def decode(numbers: Sequence[int]) -> list[Request]:
    """Read the requests that `encode` wrote. Raises ValueError if these are none."""
    left, found = list(numbers), []
    if not all(0 <= number < MOST for number in left):
        raise ValueError("sizes out of range")

    def take(count: int, width: int) -> list[Any]:
        taken = left[: count * width]
        del left[: count * width]
        if len(taken) < count * width:
            raise ValueError("sizes that end too early")
        return [tuple(taken[i : i + width]) for i in range(0, len(taken), width)]

    while left:
        ((rank, after_rank, sizes, asked, merged),) = take(1, 5)
        request = Request(rank, tuple(take(sizes, 2)), after_rank, tuple(take(asked, 3)), merged=tuple(take(merged, 3)))
        axes = [axis for axis, *_ in request.sizes] + [last for *_, last in request.merged]
        results = [axis for axis, *_ in (*request.asked, *request.merged)] if after_rank else []
        if (
            not request.asked + request.merged
            or max(axes, default=0) >= rank
            or max(results, default=0) >= max(after_rank, 1)
        ):
            raise ValueError("sizes of axes that no tensor has")
        found.append(request)
    return found


class _Answers(TorchFunctionMode):
    """While active, calls that ask for the sizes of before get those that are left."""

    def __init__(self, requests: Iterable[Request]) -> None:
        super().__init__()
        self._views = [request for request in requests if request.after_rank]
        self._splits = [request for request in requests if not request.after_rank]

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if args and isinstance(args[0], Tensor):
            if name in ("view", "reshape") and not kwargs:
                args = self._viewed(args)
            elif name == "expand" and not kwargs:
                args = self._expanded(args)
            elif name == "unflatten":
                args, kwargs = self._unflattened(*args, **kwargs), {}
            elif name in ("split", "split_with_sizes"):
                args, kwargs = self._split(*args, **kwargs), {}
        return function(*args, **kwargs)

    def _viewed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """args: a tensor, and sizes one by one or in a sequence, or a type."""
        x, *rest = args
        if len(rest) == 1 and not isinstance(rest[0], Sequence):
            return args  # of a type, or to one axis
        return x, self._meant(x, rest[0] if isinstance(rest[0], Sequence) else rest)

    def _unflattened(self, x: Tensor, dim: Any, sizes: Any) -> tuple[Any, ...]:
        if not isinstance(dim, int):
            return x, dim, sizes
        axis = dim % x.dim()
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        meant = self._meant(x, [*before, *sizes, *after])
        return x, dim, tuple(meant[axis : axis + len(sizes)])

    def _meant(self, x: Tensor, shape: Sequence[Any]) -> Sequence[Any]:
        """Return the shape of the first request that fits; what is asked for if that does, or if none does."""
        if -1 not in map(_known, shape) and _holds(shape, x):
            return shape
        found = (request.view(x, shape) for request in self._views if request.is_made_on(x))
        return next((meant for meant in found if meant is not None and _holds(meant, x)), shape)

    def _expanded(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        shape = rest[0] if isinstance(rest[0], Sequence) else rest
        found = (request.view(x, shape) for request in self._views if request.is_made_on(x))
        return x, next((meant for meant in found if meant is not None), shape)

    def _split(self, x: Tensor, split_size_or_sections: Any, dim: Any = 0) -> tuple[Any, ...]:
        sizes = split_size_or_sections
        for request in self._splits:
            if isinstance(dim, int) and request.sizes[0][0] == dim % x.dim() and request.is_made_on(x):
                sizes = request.parts(sizes) or sizes
                break
        return x, sizes, dim


def _holds(shape: Sequence[Any], x: Tensor) -> bool:
    """Tell whether a tensor can have this shape, in which one size may be -1."""
    known = [size for size in shape if _known(size) != -1]
    count = math.prod(known)
    return bool(x.numel() == count) if len(known) == len(shape) else bool(count != 0 and x.numel() % count == 0)


def _known(size: Any) -> int | None:
    """Return a size as a plain number; None if an export leaves it open."""
    if isinstance(size, Tensor):  # while it is traced
        return int(size)
    return size if isinstance(size, int) else None


def _equal(size: Any, *wanted: int) -> bool:
    return _known(size) in wanted

"""Speed up forward passes that only compute shapes.

On tensors without data, torch works out the shapes of norms, activations and linear layers in Python. That takes half a
millisecond each, most of a forward pass; an LSTM is worked out step by step. Here the answer is immediate if the sizes
fit; if not, torch itself says what is wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Answer = tuple[int, ...] | None  # None: the sizes do not fit


def _as_input(x: Tensor, *_: Any, **__: Any) -> Answer:
    return tuple(x.shape)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Answer:
    fits = x.dim() > 1 and all(t is None or t.shape == x.shape[1:2] for t in (running_mean, running_var, weight, bias))
    return tuple(x.shape) if fits else None


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Answer:
    shape, wanted = tuple(x.shape), tuple(normalized_shape)
    fits = shape[len(shape) - len(wanted) :] == wanted
    return shape if fits and all(t is None or tuple(t.shape) == wanted for t in (weight, bias)) else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Answer:
    fits = x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    return (*x.shape[:-1], weight.shape[0]) if fits else None


def _mean(x: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, **options: Any) -> Answer:
    wanted = (dim,) if isinstance(dim, int) else tuple(dim or ())
    if options or not wanted or not all(-x.dim() <= axis < x.dim() for axis in wanted):
        return None
    axes = {axis % x.dim() for axis in wanted}
    left = [(axis, size) for axis, size in enumerate(x.shape) if keepdim or axis not in axes]
    return tuple(1 if axis in axes else size for axis, size in left) if len(axes) == len(wanted) else None


def _interpolate(
    x: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    *_: Any,
    **__: Any,
) -> Answer:
    axes, smooth = x.dim() - 2, {1: "linear", 2: "bilinear", 3: "trilinear"}
    is_cubic = mode == "bicubic" and axes == 2
    fits = axes in smooth and (mode == "nearest" or is_cubic or mode == smooth[axes])
    if not fits or (size is None) == (scale_factor is None) or (align_corners is not None and mode == "nearest"):
        return None
    asked: Any = scale_factor if size is None else size
    each = tuple(asked) if isinstance(asked, Sequence) else (asked,) * axes
    sizes = each if size is not None else tuple(int(old * factor) for old, factor in zip(x.shape[2:], each))
    return (*x.shape[:2], *sizes) if len(each) == axes and all(new > 0 for new in sizes) else None


# Arguments beyond the first are named as torch names them: they may come by name.
ANSWERS: dict[Any, Callable[..., Answer]] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    F.interpolate: _interpolate,
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys(
        (F.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.silu, F.gelu, F.elu, F.leaky_relu, F.mish),
        _as_input,
    ),
    **dict.fromkeys((F.dropout, torch.relu, torch.relu_, torch.sigmoid, Tensor.sigmoid, torch.tanh), _as_input),
}


def _lstm(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    trains: bool,
    is_bidirectional: bool,
    batch_first: bool = False,
) -> Sequence[tuple[int, ...]] | None:
    """Return the shapes of all outputs and of the last two states, as `torch.lstm` does for sequences of one length."""
    directions = 2 if is_bidirectional else 1
    each = len(weights) // (layers * directions)
    if x.dim() != 3 or each != (4 if has_biases else 2):  # no projections
        return None
    hidden = weights[1].shape[1]
    for i, weight in enumerate(weights):
        inputs = x.shape[2] if i < each * directions else hidden * directions
        wanted: tuple[int, ...] = ((4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))[i % each]
        if tuple(weight.shape) != wanted:
            return None
    shape = (layers * directions, x.shape[0 if batch_first else 1], hidden)
    return [(*x.shape[:2], hidden * directions), shape, shape] if all(s.shape == shape for s in states) else None


class ShapesAlone(TorchFunctionMode):
    """While active, results have the right shapes and types, but no meaning and no gradients but of LSTM inputs."""

    def __init__(self, *, trains: bool = False) -> None:
        """trains: gradients are wanted, so only LSTMs are answered."""
        super().__init__()
        self._answers = {} if trains else ANSWERS

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = self._answers.get(function)
        if answer is not None and args:
            shape = answer(*args, **kwargs)
            if shape is not None:
                return args[0].new_empty(shape)
        if function is torch.lstm and isinstance(args[1], Sequence):  # packed sequences come in another order
            shapes = _lstm(*args, **kwargs)
            if shapes is not None:
                return tuple(args[0].mean().expand(shape).contiguous() for shape in shapes)
        return function(*args, **kwargs)

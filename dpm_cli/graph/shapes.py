"""Speed up forward passes that only compute shapes.

On tensors without data, torch works out the shapes of norms, activations and linear layers in Python. That takes half a
millisecond each, most of a forward pass. Here the answer is immediate if the sizes fit; if not, torch itself says what
is wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

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


# Arguments beyond the first are named as torch names them: they may come by name.
ANSWERS: dict[Any, Callable[..., Answer]] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    **dict.fromkeys(
        (F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.silu, F.gelu, F.elu, F.leaky_relu, F.mish, F.dropout),
        _as_input,
    ),
}


class ShapesAlone(TorchFunctionMode):
    """While active, results have the right shapes and types but no meaning. For eval mode without gradients."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = ANSWERS.get(function)
        if answer is not None and args:
            shape = answer(*args, **kwargs)
            if shape is not None:
                return args[0].new_empty(shape)
        return function(*args, **kwargs)

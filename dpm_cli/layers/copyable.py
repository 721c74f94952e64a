"""Keep models copyable whose layers compute their weights in every forward.

`torch.nn.utils.weight_norm` and `spectral_norm` leave the computed weight on the layer, with the history of its
computation, and torch refuses to copy such tensors. The history belongs to the forward alone.
"""

from typing import Any

from torch import Tensor, nn


def drop_histories_(model: nn.Module) -> None:
    """Cut tensors that layers computed, and still hold, from the history of their computation."""
    for layer in model.modules():
        _drop(layer)


def keep_copyable_(model: nn.Module) -> nn.Module:
    """Drop histories now, and behind every forward of layers that compute a tensor before it. Returns the model."""
    for layer in model.modules():
        _drop(layer)
        computes = layer._forward_pre_hooks and any(isinstance(value, Tensor) for value in vars(layer).values())
        if computes and _drop_behind not in layer._forward_hooks.values():
            layer.register_forward_hook(_drop_behind)
    return model


def _drop(layer: nn.Module) -> None:
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            vars(layer)[name] = value.detach()


def _drop_behind(layer: nn.Module, inputs: Any, outputs: Any) -> None:
    _drop(layer)

"""Lay gradients and optimizer state out in memory as their parameters.

CUDA's kernels for many tensors at once take them as flat memory: they need equal strides, also along axes of length 1,
where autograd gives any. Otherwise the fused optimizers raise, and the others launch a kernel for each tensor.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer


def lay_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with the strides of another of its shape: a view if only axes of length 1 differ."""
    if tensor.stride() == like.stride():
        return tensor
    axes = zip(tensor.shape, tensor.stride(), like.stride())
    if all(size == 1 or mine == other for size, mine, other in axes):
        return tensor.as_strided(like.shape, like.stride())
    return torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def lay_out_gradients_(optimizer: Optimizer) -> None:
    """Do so for the gradients of all parameters. Call after backward."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = lay_out_like(gradient, parameter)


def lay_out_state_(optimizer: Optimizer) -> None:
    """Do so for all that the optimizer remembers of the shape of a parameter. Call after units were removed."""
    for parameter, remembered in optimizer.state.items():
        for key, value in remembered.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                remembered[key] = lay_out_like(value, parameter)

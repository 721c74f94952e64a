"""Normalise by the statistics of a whole batch whose images are spread over several processes.

This computes what nn.SyncBatchNorm does, but also on CPUs and without replacing modules. Inside `normalising_together`
every batch_norm in train mode, even of custom layers, uses the mean and variance over all processes' images. Running
statistics are then the same everywhere.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def normalising_together() -> AbstractContextManager[object]:
    """Wrap the forward pass of one training step, on all processes at once. Each needs at least one image."""
    return _Mode()


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_batch_norm if function is F.batch_norm else function)(*args, **(kwargs or {}))


def _batch_norm(
    values: Tensor,  # (B, C, ...), this process's slice
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute F.batch_norm over the whole batch."""
    if not training:
        return F.batch_norm(values, running_mean, running_var, weight, bias, False, momentum, eps)
    mean, variance, count = _moments(values.detach())
    unbiased = variance * (count / (count - 1).clamp_min(1))
    update_running_statistics_(running_mean, running_var, mean, unbiased, momentum)
    normalised: Tensor = _Normalise.apply(values, weight, bias, mean, variance, count, eps)
    return normalised


def update_running_statistics_(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, unbiased: Tensor, momentum: float
) -> None:
    """Update running statistics, if there are any, as F.batch_norm does in train mode. All are (C,)."""
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def _moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (C,) mean, (C,) biased variance and () values per channel over all processes (Chan et al. 1979)."""
    axes = [0, *range(2, values.dim())]
    variance, mean = torch.var_mean(values.float(), axes, correction=0)
    count = mean.new_tensor([values.numel() // values.shape[1]])
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = mean.new_zeros(size, 2 * len(mean) + 1)  # a row per process; the sum gathers them
    rows[rank] = torch.cat([mean, variance, count])
    dist.all_reduce(rows)
    means, variances, counts = rows[:, : len(mean)], rows[:, len(mean) : -1], rows[:, -1:]  # (processes, C or 1)
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    variance = ((variances + (means - mean).square()) * counts).sum(0) / count
    return mean, variance, count


class _Normalise(torch.autograd.Function):
    """Computes weight · (x − mean) / √(variance + eps) + bias, with the gradient through the global statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(values, weight, mean, (variance + eps).rsqrt(), count)
        ctx.has_bias = bias is not None
        return F.batch_norm(values, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, mean, scale, count = ctx.saved_tensors
        shape, axes = [1, -1, *[1] * (values.dim() - 2)], [0, *range(2, values.dim())]
        gradient = gradients[0].float()
        normalised = (values - mean.view(shape)) * scale.view(shape)
        sums = torch.stack([gradient.sum(axes), (gradient * normalised).sum(axes)])  # (2, C)
        of_bias, of_weight = sums.unbind()  # only this process's share, as DistributedDataParallel averages them
        totals = sums.clone()
        dist.all_reduce(totals)
        by_mean, by_scale = (totals / count).view(2, *shape).unbind()
        if weight is not None:
            scale = scale * weight
        of_values = (gradient - by_mean - normalised * by_scale) * scale.view(shape)
        return (
            of_values.to(values.dtype),
            of_weight if weight is not None else None,
            of_bias if ctx.has_bias else None,
            *[None] * 4,
        )

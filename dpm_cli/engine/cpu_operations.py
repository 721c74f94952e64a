"""Replace PyTorch operations that are slow in bf16 on CPUs by faster ones."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from dpm_cli.engine.whole_batch import update_running_statistics_

LINE = 16  # floats per cache line
FOLDED, NARROW = 64, 64  # minimum channels after folding; channels below which folding pays


class FasterOnCpu(TorchFunctionMode):
    """Speeds up depthwise convolutions and narrow batch norms inside autocast to bf16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            return _convolve(*args, **kwargs)
        if func is F.batch_norm:
            return _normalise(*args, **kwargs)
        return func(*args, **kwargs)


def _convolve(*args: Any, **kwargs: Any) -> Tensor:
    """Compute depthwise convolutions in fp32 between bf16 neighbours.

    PyTorch has no fast backward pass for most of them in bf16 (strides, 5×5, maps of a few pixels).
    """
    if len(args) > 1:
        images, weight, *rest = args
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        if groups == images.shape[-3] > 1:
            with torch.autocast("cpu", enabled=False):
                return torch.conv2d(images.float(), weight.float(), *rest, **kwargs).bfloat16()
    return torch.conv2d(*args, **kwargs)


def _normalise(
    images: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute `F.batch_norm`, folded where that is faster."""
    fold = _fold_of(images) if training and weight is not None and bias is not None else 1
    if fold == 1:
        return F.batch_norm(images, running_mean, running_var, weight, bias, training, momentum, eps)
    outputs, mean, variance = _FoldedBatchNorm.apply(images, weight, bias, eps, fold)
    count = images.numel() // images.shape[1]
    update_running_statistics_(running_mean, running_var, mean, variance * (count / (count - 1)), momentum)
    return outputs  # type: ignore[no-any-return]


def _fold_of(images: Tensor) -> int:
    """Choose how many pixels to fold into one; 1 if folding is impossible or not faster."""
    if images.dim() != 4 or images.dtype not in (torch.bfloat16, torch.float32):
        return 1
    channels, pixels = images.shape[1], images.numel() // max(images.shape[1], 1)
    if not 0 < channels < NARROW or channels % LINE == 0 or pixels < 2:
        return 1
    if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return 1
    fold = LINE // math.gcd(channels, LINE)
    while fold * channels < FOLDED:
        fold *= 2
    return fold if pixels % fold == 0 else 1


class _FoldedBatchNorm(torch.autograd.Function):
    """Computes training batch norm of few channels (channels last) as one of `fold` times as many, on the same memory.

    PyTorch's kernel sums into one row of channels per thread. Rows of 8 or 24 channels share a
    cache line, which makes two threads several times slower than one, and few channels do not fill a vector. The
    means and variances of the parts are merged exactly; in bf16 the gradient of the images is rounded three times
    instead of once.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, eps: float, fold: int) -> Any:
        """Normalise images (B, C, H, W), channels last. Returns them with mean and biased variance, each (C,)."""
        channels = images.shape[1]
        folded = _folded(images, fold)
        unused = torch.zeros(2, fold * channels, dtype=weight.dtype)  # their dtype sets that of the results
        means, variances = torch.batch_norm_update_stats(folded, unused[0], unused[1], 0.0)
        means = means.view(fold, channels)
        mean = means.mean(0)
        variance = variances.view(fold, channels).mean(0) + (means - mean).square().mean(0)
        outputs = _affine(images, weight, bias, mean, variance, eps, fold)
        ctx.save_for_backward(images, weight, mean, variance)
        ctx.eps, ctx.fold = eps, fold
        ctx.mark_non_differentiable(mean, variance)
        return outputs, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        images, weight, mean, variance = ctx.saved_tensors
        fold, channels = ctx.fold, images.shape[1]
        folded = _folded(images, fold)
        gradient = _folded(gradient.contiguous(memory_format=torch.channels_last), fold)
        # First the gradient with fixed statistics, then the part through the statistics.
        of_images, of_weights, of_biases = torch.ops.aten.native_batch_norm_backward(
            gradient,
            folded,
            weight.repeat(fold),
            mean.repeat(fold),
            variance.repeat(fold),
            None,
            None,
            False,
            ctx.eps,
            [True, True, True],
        )
        of_weight, of_bias = of_weights.view(fold, channels).sum(0), of_biases.view(fold, channels).sum(0)
        share = -weight * (variance + ctx.eps).rsqrt() / (images.numel() // channels)
        through = _affine(images, share * of_weight, share * of_bias, mean, variance, ctx.eps, fold)
        _folded(through, fold).add_(of_images)
        return through, of_weight, of_bias, None, None


def _affine(
    images: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float, fold: int
) -> Tensor:
    """Compute (images - mean) / sqrt(variance + eps) * weight + bias; all but the images are (C,)."""
    outputs = torch.empty_like(images)  # not a view, so that an in-place activation can follow
    weight, bias, mean, variance = (values.repeat(fold) for values in (weight, bias, mean, variance))
    torch.ops.aten.native_batch_norm.out(
        _folded(images, fold),
        weight,
        bias,
        mean,
        variance,
        False,
        0.0,
        eps,
        out=_folded(outputs, fold),
        save_mean=weight.new_empty(0),
        save_invstd=weight.new_empty(0),
    )
    return outputs


def _folded(images: Tensor, fold: int) -> Tensor:
    """View (B, C, H, W), channels last, as (pixels / fold, fold * C, 1, 1)."""
    return images.permute(0, 2, 3, 1).reshape(-1, fold * images.shape[1], 1, 1)

"""Pruning On-the-Fly (arXiv 2212.12651) as pure functions: penalties, masks, cuts and recoveries.

The abstract describes the method: a penalty pushes part of the weights far from zero and the rest to zero, and after
training the small ones are cut and replaced by their mean. No formulas were published, so those here are ours.
"""

import math
from collections.abc import Iterable
from typing import Literal, assert_never

import torch
from torch import Tensor

from dpm_cli.sparse.hypersphere import Per, normalise, rows_of

Recovery = Literal["none", "mean", "signed-mean", "split-mean"]


def keep_largest(weight: Tensor, sparsity: float, per: Per) -> Tensor:
    """Mask the (1 − sparsity) · n entries with the largest directions in the layer; at least one."""
    size = normalise(weight.detach(), per).abs().flatten()
    mask = torch.zeros_like(size, dtype=torch.bool)
    mask[size.topk(count_kept([weight], sparsity), sorted=False).indices] = True
    return mask.view_as(weight)


def count_kept(tensors: Iterable[Tensor], sparsity: float) -> int:
    """Count the entries that `keep_largest` keeps in all tensors."""
    return sum(max(1, tensor.numel() - round(sparsity * tensor.numel())) for tensor in tensors)


def keep_above(weight: Tensor, threshold: float, per: Per) -> Tensor:
    """Mask the entries that are at least threshold × RMS of their filter (or layer)."""
    rows = rows_of(normalise(weight.detach(), per), per)
    kept: Tensor = (rows.abs() * math.sqrt(rows.shape[1])).ge(threshold)
    return kept.view_as(weight)


def ternary_cosine(weight: Tensor, mask: Tensor) -> Tensor:
    """Compute 1 − cos(w, sign(w)·mask) in [0, 1]: 0 if kept entries are all ±c and the others 0, for any c."""
    kept = weight.abs().masked_fill(~mask, 0).sum()
    norm = torch.linalg.vector_norm(weight) * mask.sum().to(weight.dtype).sqrt()
    cosine: Tensor = kept / norm.clamp_min(torch.finfo(weight.dtype).tiny)
    return 1 - cosine


def tail_energy(weight: Tensor, mask: Tensor) -> Tensor:
    """Compute the share of Σ w² outside the mask, in [0, 1]."""
    squares = weight.square()
    return squares.masked_fill(mask, 0).sum() / squares.sum().clamp_min(torch.finfo(weight.dtype).tiny)


def recover(weight: Tensor, mask: Tensor, how: Recovery, per: Per) -> Tensor:
    """Replace the entries outside the mask by recovered values.

    none: zeros. mean: their mean, as the abstract reads. signed-mean: their own signs times the mean of their absolute
    values. split-mean: separate means of positive and negative ones. Each is taken over a filter or the layer.
    """
    rows = rows_of(weight, per)
    cut = ~mask.view(rows.shape)
    match how:
        case "none":
            filling = torch.zeros_like(rows)
        case "mean":
            filling = _mean(rows, cut)
        case "signed-mean":
            filling = _mean(rows.abs(), cut) * torch.where(rows < 0, -1, 1)
        case "split-mean":
            negative = rows < 0
            filling = torch.where(negative, _mean(rows, cut & negative), _mean(rows, cut & ~negative))
        case _:
            assert_never(how)
    return torch.where(cut, filling + 0.0, rows).view_as(weight)  # adding 0 turns −0 into 0


def _mean(rows: Tensor, chosen: Tensor) -> Tensor:
    """Average (rows, 1) the chosen entries, 0 without any; in fp64, so that equal numbers average exactly."""
    total = rows.double().masked_fill(~chosen, 0).sum(1, keepdim=True)
    return (total / chosen.sum(1, keepdim=True).clamp_min(1)).to(rows.dtype)


def ramp_sparsity(progress: float, sparsity: float, end: float = 0.5) -> float:
    """Ramp cubically from 0 to the sparsity at `end` of training (Zhu & Gupta 2017). progress: in [0, 1]."""
    return sparsity * (1 - (1 - min(progress / end, 1)) ** 3)


def ramp_strength(progress: float, strength: float, start: float = 0.1, end: float = 0.5) -> float:
    """Ramp linearly from 0 at `start` of training to the strength at `end`."""
    return strength * min(max((progress - start) / (end - start), 0), 1)

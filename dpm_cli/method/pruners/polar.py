"""Compute the penalty `channel-polar`, which pulls units to zero or pushes them away (after arXiv 2212.12651)."""

import torch
from torch import Tensor


def polar_pulls(norms: Tensor, group_of_unit: Tensor, groups: int) -> Tensor:
    """Compute (units,) the fraction of itself by which each unit is pulled to zero; negative if pushed away.

    This is descent on the ternary cosine of every group's norms, keeping units above their group's mean. It is scaled
    by the squared length of these norms, so that a strength means the same as for weight decay.
    """
    zeros = torch.zeros(groups, dtype=norms.dtype, device=norms.device)

    def total(values: Tensor) -> Tensor:
        return zeros.index_add(0, group_of_unit, values)[group_of_unit]

    ones = torch.ones_like(norms)
    kept = norms * total(ones) >= total(norms)
    length = total(norms.square()).sqrt().clamp_min(torch.finfo(norms.dtype).tiny)
    width = total(kept.to(norms.dtype)).sqrt()
    cosine = total(norms * kept) / (width * length)
    return cosine - torch.where(kept, length / (width * norms).clamp_min(torch.finfo(norms.dtype).tiny), 0)

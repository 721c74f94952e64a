"""The penalty `channel-polar`: whole units are pulled to zero or pushed away from it (after arXiv 2212.12651)."""

import torch
from torch import Tensor


def polar_pulls(norms: Tensor, group_of_unit: Tensor, groups: int) -> Tensor:
    """(units,) by how much of itself each unit is pulled to zero; negative where it is pushed away.

    Descent on the ternary cosine of every group's norms, the units above their group's mean being kept, times the
    squared length of these norms, so that a strength means what it does for weight decay.
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

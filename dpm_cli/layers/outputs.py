"""What a model returns, and how far two models are apart."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.utils._pytree import tree_leaves


def output_tensors(outputs: object) -> list[Tensor]:
    """List every tensor in a model's output (a tensor, or a tuple, list or dict of them), in order."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def relative_difference(outputs: Sequence[Tensor], others: Sequence[Tensor], *, least: float = 1e-6) -> float:
    """Return the largest |a - b| / max(least, max|a|) over all pairs of outputs, computed in their own precision.

    least: the scale of outputs that are almost zero. Infinite where the two differ in number or shape, and where a
    value is not finite: NaN would pass for the smaller one in `max`.

        relative_difference([torch.tensor([1.0, 4.0])], [torch.tensor([1.0, 3.0])])  # 0.25
    """
    if [each.shape for each in outputs] != [each.shape for each in others]:
        return math.inf
    differences = [
        float((a - b).abs().max() / a.abs().max().clamp_min(least)) for a, b in zip(outputs, others) if a.numel()
    ]
    return max((each if math.isfinite(each) else math.inf for each in differences), default=0.0)

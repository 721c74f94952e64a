"""Give a copy of a model weights and inputs under which a wrong removal shows.

Untrained models give almost nothing, whatever is removed: their biases are zero, their layer scales tiny, their
statistics those of no data; and a rectifier behind the few channels that are left may hide all of them. Exact removal
is exact for any weights, so biases are drawn anew, positive, constant weights at random, and every BatchNorm takes the
statistics of what it first reads.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dpm_cli.graph.copies import copy_module
from dpm_cli.graph.groups import Groups
from dpm_cli.graph.labels import Flags
from dpm_cli.graph.program import Example
from dpm_cli.graph.trial import Trial
from dpm_cli.graph.units import Units

MOST_MACS = 8_000_000_000  # of one forward pass: a second
MOST_MACS_IN_DOUBLE = 2_000_000_000  # of one forward pass that only is to tell rounding from a change
ENOUGH_MACS = 500_000_000  # of one forward pass, before even smaller pictures are tried
LEAST_SIDE, STRIDE = 64, 32  # of smaller pictures: at least so many pixels, and a multiple of
MOST_PARAMETERS = 300_000_000
FEW = 8  # values of a channel that are too few for statistics
LEAST_VARIANCE = 1e-2  # pooled noise hardly varies: it would be blown up


def make_lively(model: nn.Module, example: Example, groups: Groups, alive: Flags) -> Trial | None:
    """Prepare a trial of one removal on a lively copy. alive: (units,)

    None if that takes too long (the run compares outputs at every removal anyway), or if the copy does not run.
    """
    everything = np.ones(groups.units, bool)
    if groups.cost.parameters(everything) > MOST_PARAMETERS:
        return None
    macs, one = groups.cost.macs(everything), _first(example, groups.cost.batch)
    costs = [(macs // parts**2, _smaller(one, parts)) for parts in ((4, 2) if macs // 4 > ENOUGH_MACS else (2,))]
    costs += [(macs, one), (macs * groups.cost.batch, example)]
    candidates = [(cost, inputs) for cost, inputs in costs if cost < MOST_MACS]
    if not candidates:
        return None
    draw = torch.Generator().manual_seed(0)
    lively = copy_module(model, {}).eval()
    if all(not parameter.is_floating_point() or parameter.dtype.itemsize < 4 for parameter in lively.parameters()):
        lively = lively.float()
    _draw_(lively, draw)
    Units(groups, lively).scale_(torch.from_numpy(alive).float())
    for cost, inputs in candidates:
        norms = [module for module in lively.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.forward = _Calibration(norm)  # type: ignore[assignment,method-assign]
        try:
            trial = Trial(lively, _vary(inputs, draw), groups, alive, is_dear=cost > MOST_MACS_IN_DOUBLE)
        except Exception:  # whatever the model's own code raises: for a batch of one, perhaps
            continue
        finally:
            for norm in norms:
                del norm.forward
        if all(output.isfinite().all() for output in trial.before if output.is_floating_point()):
            return trial
    return None


class _Calibration:
    """The forward of a BatchNorm that first takes its statistics from its first input."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        self._norm, self._forward, self._is_over = norm, norm.forward, norm.running_mean is None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._is_over and x.dim() > 1:
            self._is_over = True
            self._take(x.detach().transpose(0, 1).flatten(1))
        return self._forward(x, *args, **kwargs)

    def _take(self, x: Tensor) -> None:
        """x: (channels, values)"""
        norm = self._norm
        if x.shape[1] >= FEW and norm.running_mean is not None and norm.running_var is not None:
            variance, mean = torch.var_mean(x, 1)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance.clamp_min(LEAST_VARIANCE))


@torch.no_grad()
def _draw_(model: nn.Module, draw: torch.Generator) -> None:
    """Draw biases, and parameters that are constant: fresh norms, layer scales, layers that are zero at first."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() < 2 and name.endswith("bias"):
            parameter.uniform_(0.2, 0.8, generator=draw)
        elif _is_constant(parameter) and parameter.dim() < 2 and abs(float(parameter.flatten()[0])) > 0.1:
            parameter.uniform_(0.5, 1.5, generator=draw)
        elif _is_constant(parameter):
            parameter.normal_(0, 0.1, generator=draw)


def _is_constant(tensor: Tensor) -> bool:
    """Tell whether all entries are the same number."""
    flat = tensor.flatten()
    return bool(len(flat)) and bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())


def _smaller(example: Example, parts: int) -> Example:
    """Cut the sides of pictures into so many parts, which is enough for models that take any size.

    The sides stay multiples of what most models divide them by.
    """

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() != 4 or min(tensor.shape[2:]) < 2 * LEAST_SIDE:
            return tensor
        height, width = (max(LEAST_SIDE, side // parts // STRIDE * STRIDE) for side in tensor.shape[2:])
        return tensor[..., :height, :width]

    smaller: Example = tree_map_only(Tensor, cut, example)
    return smaller


def _first(example: Example, batch: int) -> Example:
    """Take the first of a batch of inputs."""
    one: Example = tree_map_only(Tensor, lambda t: t[:1] if t.dim() and len(t) == batch else t, example)
    return one


def _vary(example: Example, draw: torch.Generator) -> Example:
    """Replace inputs that are constant by noise."""

    def vary(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.numel() < 2 or not _is_constant(tensor):
            return tensor
        return torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)

    varied: Example = tree_map_only(Tensor, vary, example)
    return varied

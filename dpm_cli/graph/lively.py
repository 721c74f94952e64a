"""Give a copy of a model weights and inputs under which a wrong removal shows.

Untrained models give almost nothing, whatever is removed: their biases are zero, their layer scales tiny, their
statistics those of no data. Exact removal is exact for any weights, so constant ones are drawn at random, and every
BatchNorm takes the statistics of what it first reads.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dpm_cli.graph.groups import Groups
from dpm_cli.graph.labels import Flags
from dpm_cli.graph.program import Example
from dpm_cli.graph.trial import Trial
from dpm_cli.graph.units import Units

MANY_MACS, MOST_MACS = 6_000_000_000, 16_000_000_000  # for one input: one second, and two or three
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
    candidates = [one, example] if macs < MANY_MACS else [_smaller(one), one] if macs < MOST_MACS else [_smaller(one)]
    draw = torch.Generator().manual_seed(0)
    lively = copy.deepcopy(model).eval()
    if all(not parameter.is_floating_point() or parameter.dtype.itemsize < 4 for parameter in lively.parameters()):
        lively = lively.float()
    _draw_constants_(lively, draw)
    Units(groups, lively).scale_(torch.from_numpy(alive).float())
    for inputs in candidates:
        hooks = [
            module.register_forward_pre_hook(_Calibration())
            for module in lively.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        ]
        try:
            trial = Trial(lively, _vary(inputs, draw), groups, alive)
        except Exception:  # whatever the model's own code raises: for a batch of one, perhaps
            continue
        finally:
            for hook in hooks:
                hook.remove()
        if all(output.isfinite().all() for output in trial.before if output.is_floating_point()):
            return trial
    return None


class _Calibration:
    """Sets the statistics of a BatchNorm from the first input that it reads."""

    def __init__(self) -> None:
        self._is_over = False

    def __call__(self, norm: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if self._is_over or not inputs or inputs[0].dim() < 2:
            return
        self._is_over = True
        x = inputs[0].detach().transpose(0, 1).flatten(1)  # (channels, values)
        if x.shape[1] >= FEW and norm.running_mean is not None and norm.running_var is not None:
            variance, mean = torch.var_mean(x, 1)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance.clamp_min(LEAST_VARIANCE))


@torch.no_grad()
def _draw_constants_(model: nn.Module, draw: torch.Generator) -> None:
    """Draw parameters that are constant: fresh norms and biases, layer scales, layers that are zero at first."""
    for parameter in model.parameters():
        flat = parameter.flatten()
        if (
            not parameter.is_floating_point()
            or not len(flat)
            or bool(flat[0] != flat[-1])
            or bool((flat != flat[0]).any())
        ):
            continue
        if parameter.dim() < 2 and abs(float(flat[0])) > 0.1:
            parameter.uniform_(0.5, 1.5, generator=draw)
        else:
            parameter.normal_(0, 0.1, generator=draw)


def _is_constant(tensor: Tensor) -> bool:
    """Tell whether all entries are the same number."""
    flat = tensor.flatten()
    return bool(len(flat)) and bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())


def _smaller(example: Example) -> Example:
    """Halve the sides of pictures, which is enough for models that take any size."""

    def halve(tensor: Tensor) -> Tensor:
        is_picture = tensor.dim() == 4 and min(tensor.shape[2:]) >= 64
        return tensor[..., : tensor.shape[2] // 2, : tensor.shape[3] // 2] if is_picture else tensor

    halved: Example = tree_map_only(Tensor, halve, example)
    return halved


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

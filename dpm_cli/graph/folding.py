"""Fold means: the layers that read a removed unit go on with its mean output.

A layer's outputs lose W_R a_R when the units R go. The constant nearest to that, in squares, is its mean over images
and positions; a channel that never varies is replaced exactly. At zero-padded borders fewer taps meet the channel, so
there no constant is exact: the mean over all positions, borders included, is still the nearest one.

No labels and no gradients are needed. Fold before the units are zeroed: a dead unit has nothing left to measure.
"""

import copy
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.graph.groups import Groups
from dpm_cli.graph.labels import Flags, Ids
from dpm_cli.graph.program import Example, find_layer_calls
from dpm_cli.layers.modes import in_mode

MatrixLayer = nn.Linear | nn.modules.conv._ConvNd
ReadAxes = list[tuple[int, Ids]]  # (axis of a weight, unit of every index along it)
Shifts = dict[str, str]  # layer -> the tensor through which a constant can be added to its outputs
Pool = Callable[[Tensor], Tensor]


def find_shifts(model: nn.Module, example: Example) -> Shifts:
    """Find where a constant can be added to the outputs of every convolution and linear layer.

    That is its bias; without one, the running mean of the BatchNorm that alone reads it; without that, the bias that
    `give_biases_` will make.
    """
    shifts: dict[str, str] = {}
    for layer, reader in find_layer_calls(model, example):
        has_bias = model.get_submodule(layer).bias is not None
        mean = f"{reader}.running_mean"
        takes_mean = reader is not None and not has_bias and shifts.get(layer, mean) == mean
        shifts[layer] = mean if takes_mean else f"{layer}.bias"
    return shifts


def give_biases_(model: nn.Module, groups: Groups, shifts: Shifts) -> list[str]:
    """Give a bias of zeros to every layer that reads units and has no place for a constant. Returns these layers.

    If there are any, call `find_groups` again: the new biases belong to units.
    """
    bare = []
    for layer in _consumers(groups):
        module = model.get_submodule(layer)
        if isinstance(module, MatrixLayer) and module.bias is None and shifts.get(layer) == f"{layer}.bias":
            rows = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            module.bias = nn.Parameter(module.weight.new_zeros(rows), requires_grad=module.weight.requires_grad)
            bare.append(layer)
    return bare


@torch.no_grad()
def fold_means_(
    model: nn.Module,
    groups: Groups,
    alive: Flags,
    images: Iterable[Tensor],
    shifts: Shifts,
    *,
    pool: Pool = Tensor.clone,
) -> list[str]:
    """Add the mean of dead units to the layers that read them. Call before the units are zeroed.

    Arguments as of `measure_lost`. Returns the layers that read dead units but could take no constant.
    """
    lost = measure_lost(model, groups, alive, images, pool=pool)
    left = []
    for layer in (layer for layer, axes in _consumers(groups).items() if _reads_dead(axes, alive)):
        owner, _, name = shifts.get(layer, "").rpartition(".")
        tensor = getattr(model.get_submodule(owner), name, None) if name else None
        if layer not in lost or not isinstance(tensor, Tensor):
            left.append(layer)
        elif name == "running_mean":
            tensor -= lost[layer].to(tensor)
        else:
            tensor += lost[layer].to(tensor)
    return left


@torch.no_grad()
def measure_lost(
    model: nn.Module, groups: Groups, alive: Flags, images: Iterable[Tensor], *, pool: Pool = Tensor.clone
) -> dict[str, Tensor]:
    """Measure what dead inputs add to each layer's outputs, on average over images and positions, in eval mode.

    alive: (units,). images: batches (B, C, H, W). pool: averages over the processes, each with its slice of the images.
    Returns layer -> (channels,). Layers whose weights are used without calling them are absent.
    """
    sums: dict[str, Tensor] = {}  # layer -> (channels + 1,); the last one counts
    hooks = []
    for layer, axes in _consumers(groups).items():
        module = model.get_submodule(layer)
        if _reads_dead(axes, alive) and isinstance(module, MatrixLayer):
            part = _dead_part(module, axes, alive)

            def add(
                module: nn.Module,
                inputs: tuple[Tensor, ...],
                output: Tensor,
                *,
                layer: str = layer,
                part: nn.Module = part,
            ) -> None:
                lost = part(inputs[0])
                channels = lost.dim() - 1 if isinstance(part, nn.Linear) else 1
                rows = lost.double().movedim(channels, 0).flatten(1)  # (channels, images and positions)
                sums[layer] = sums.get(layer, 0) + torch.cat([rows.sum(1), rows.new_tensor([rows.shape[1]])])

            hooks.append(module.register_forward_hook(add))
    try:
        with in_mode(model, training=False):
            for batch in images:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    means = {layer: pool(total) for layer, total in sums.items()}
    return {layer: mean[:-1] / mean[-1] for layer, mean in means.items()}


def _consumers(groups: Groups) -> dict[str, ReadAxes]:
    """Find where the weights of each layer read units."""
    consumers: dict[str, ReadAxes] = {}
    for part in groups.slices:
        for name in groups.aliases.get(part.tensor, (part.tensor,)):
            layer, _, leaf = name.rpartition(".")
            if part.role.is_consuming and leaf == "weight":
                consumers.setdefault(layer, []).append((part.axis, part.units))
    return consumers


def _reads_dead(axes: ReadAxes, alive: Flags) -> bool:
    """Tell whether any of these axes reads a dead unit."""
    stays = np.append(alive, True)
    return any(not stays[units].all() for _, units in axes)


def _dead_part(module: MatrixLayer, axes: ReadAxes, alive: Flags) -> MatrixLayer:
    """Copy a layer so that it reads only dead inputs and adds no bias."""
    part = copy.deepcopy(module)
    stays = np.append(alive, True)
    weight = part.weight.detach()
    lives = torch.ones_like(weight, dtype=torch.bool)
    for axis, units in axes:
        mask = torch.from_numpy(stays[units]).to(weight.device)
        lives &= mask.view([-1 if axis == k else 1 for k in range(weight.dim())])
    part.weight = nn.Parameter(weight.masked_fill(lives, 0), requires_grad=False)
    part.bias = None
    return part

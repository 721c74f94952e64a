"""Recompute BatchNorm statistics exactly over all given batches, instead of a moving average of recent ones.

Follows PreciseBN (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", §3), but also counts the spread between
batches.
"""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpm_cli.engine.distributed import ALONE, World
from dpm_cli.engine.precision import Precision
from dpm_cli.layers.modes import in_mode


class _Pool:
    """Merges the mean and variance of all inputs of one layer, batch by batch in fp64 (Chan et al. 1979)."""

    def __init__(self, layer: _BatchNorm, world: World) -> None:
        self.count, self._world = 0, world
        self.mean = torch.zeros_like(_tensor(layer.running_mean), dtype=torch.float64)  # (channels,)
        self.squares = torch.zeros_like(self.mean)  # (channels,) sum of squared deviations from the mean

    def add_(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        """Add a batch, as a forward hook. With momentum 1 the running statistics are those of this batch."""
        assert isinstance(layer, _BatchNorm)
        mean, variance = _tensor(layer.running_mean).double(), _tensor(layer.running_var).double()
        count = int(self._world.sum(inputs[0].numel() // inputs[0].shape[1])[0])  # values per channel
        merged = self.count + count
        difference = mean - self.mean
        self.squares += variance * (count - 1) + difference.square() * (self.count * count / merged)
        self.mean += difference * (count / merged)
        self.count = merged


def recalibrate_batchnorm_(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    count: int,
    precision: Precision,
    world: World = ALONE,
) -> None:
    """Replace running statistics by those of `count` training batches of two or more images; 0 changes nothing.

    world: the processes, each of which was given its slice of each batch.

    All other layers run in eval mode (no dropout). Frozen layers are left alone: those without running statistics, with
    momentum 0, or in eval mode inside a model in train mode. Modes and momenta are restored.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and _adapts(module, model)]
    if not layers:
        return
    momenta = {layer: layer.momentum for layer in layers}
    pools = {layer: _Pool(layer, world) for layer in layers}
    hooks = [layer.register_forward_hook(pools[layer].add_) for layer in layers]
    try:
        with in_mode(model, training=False), torch.no_grad(), precision.autocast(), world.normalising():
            for layer in layers:
                layer.training, layer.momentum = True, 1.0
            for images, _ in islice(batches, count):
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in momenta.items():
            layer.momentum = momentum
    for layer, pool in pools.items():
        if pool.count > 1:
            _tensor(layer.running_mean).copy_(pool.mean)
            _tensor(layer.running_var).copy_(pool.squares / (pool.count - 1))


def _adapts(layer: _BatchNorm, model: nn.Module) -> bool:
    frozen = model.training and not layer.training
    return layer.running_mean is not None and layer.track_running_stats and layer.momentum != 0 and not frozen


def _tensor(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer

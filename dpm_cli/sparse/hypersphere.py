"""Train only the direction of each filter, or of a whole layer's weights, in hyperspherical layers.

After Pruning On-the-Fly (arXiv 2212.12651), which names the layers but not their form. Here the radius is the
original norm of the weights, so putting a trained model on spheres does not change it. Behind a BatchNorm the radius
has no effect. Folding back writes the effective weights into plain layers.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Per = Literal["filter", "layer"]  # whether each row of a weight shares a norm and a mean, or all of it


def rows_of(weight: Tensor, per: Per) -> Tensor:
    """View a weight as (filters, entries), or as (1, entries) for the whole layer."""
    return weight.flatten(1) if per == "filter" else weight.reshape(1, -1)


def normalise(weight: Tensor, per: Per) -> Tensor:
    """Project onto the unit sphere; zeros stay zeros."""
    rows = rows_of(weight, per)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    direction = rows / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return direction.view_as(weight)


class OnSphere(nn.Module):
    """Parametrizes a weight as radius · w / ‖w‖."""

    radius: Tensor  # (filters, 1, …), or all ones for a layer

    def __init__(self, weight: Tensor, per: Per) -> None:
        super().__init__()
        self.per: Per = per
        norms = torch.linalg.vector_norm(rows_of(weight.detach(), per), dim=1)
        self.register_buffer("radius", norms.view(-1, *[1] * (weight.dim() - 1)))

    def forward(self, weight: Tensor) -> Tensor:
        return self.radius * normalise(weight, self.per)


def put_on_sphere_(model: nn.Module, layers: Iterable[str], per: Per) -> None:
    """Train only the direction of these layers' weights from now on. Make the optimizer afterwards."""
    for layer in layers:
        module = model.get_submodule(layer)
        weight = module.weight
        assert isinstance(weight, Tensor)
        parametrize.register_parametrization(module, "weight", OnSphere(weight, per))


def take_off_sphere_(model: nn.Module, layers: Iterable[str]) -> None:
    """Turn the layers into plain ones with their effective weights."""
    for layer in layers:
        parametrize.remove_parametrizations(model.get_submodule(layer), "weight", leave_parametrized=True)


def trained_weight(module: nn.Module) -> Tensor:
    """Return the trained parameter behind a weight, on a sphere or not."""
    if parametrize.is_parametrized(module, "weight"):
        weight = module.parametrizations["weight"].original  # type: ignore[union-attr, index]
    else:
        weight = module.weight
    assert isinstance(weight, Tensor)
    return weight

"""Pruning On-the-Fly (arXiv 2212.12651): train once so that single weights can be cut later without retraining.

A penalty pushes part of the weights of hyperspherical layers away from zero and the rest towards it (polarise.py has
the formulas, which are ours). One training serves every sparsity. No units are removed: the model keeps its widths, and
cut weights become zeros or means.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import assert_never

import torch
from torch import Tensor, nn

from dpm_cli.graph import Groups, find_groups
from dpm_cli.graph.program import Example
from dpm_cli.recipe.sections import Prune, Training
from dpm_cli.sparse.hypersphere import Per, normalise, put_on_sphere_, take_off_sphere_, trained_weight
from dpm_cli.sparse.polarise import (
    Recovery,
    keep_above,
    keep_largest,
    ramp_sparsity,
    ramp_strength,
    recover,
    tail_energy,
    ternary_cosine,
)

WHY_WHOLE = "on-the-fly cuts single weights, so all channels stay"


def find_sparse_layers(model: nn.Module, keep: Sequence[str], *, keep_first: bool) -> list[str]:
    """List the convolutions and linear layers whose weights may be cut; shared weights are left alone.

    keep: names or patterns of layers that stay whole; a name covers the layers below it. keep_first: the first
    convolution stays whole too.
    """
    names = [name for name, module in model.named_modules() if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)]
    first = names[:1] if keep_first else []
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        and name not in first
        and not any(fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in keep)
        and uses[id(module.weight)] == 1
    ]


@torch.no_grad()
def cut_(
    model: nn.Module, layers: Sequence[str], *, sparsity: float, threshold: float | None, how: Recovery, per: Per
) -> dict[str, Tensor]:
    """Cut the small weights of plain layers and fill in recovered values.

    threshold: cut weights below threshold × RMS of their filter (or layer), not to a sparsity. Returns the mask of kept
    weights by parameter.
    """
    masks = {}
    for layer in layers:
        weight = model.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        mask = keep_largest(weight, sparsity, per) if threshold is None else keep_above(weight, threshold, per)
        weight.copy_(recover(weight, mask, how, per))
        masks[f"{layer}.weight"] = mask
    return masks


def measure_sparsity(masks: Mapping[str, Tensor]) -> float:
    """Compute the share of weights that the masks cut."""
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def find_whole_groups(model: nn.Module, example: Example, prune: Prune) -> Groups:
    """Find the groups of a model and keep every layer whole, each with a reason."""
    groups = find_groups(model, example, prune.keep, prune_embedding=prune.embedding == "prune")
    return groups.without(dict.fromkeys(range(len(groups)), WHY_WHOLE))


class SphereTraining:
    """Trains for Pruning On-the-Fly: puts layers on spheres and penalises their directions.

    After its ramp the penalty pushes the share `target.sparsity` (the first of several) of the weights to zero.
    """

    def __init__(self, model: nn.Module, prune: Prune, training: Training) -> None:
        """Put the layers on spheres. Make the optimizer afterwards."""
        self.settings, self.training = prune.on_the_fly, training
        self.sparsity = (prune.target.sparsity or (0.0,))[0]
        self.epoch = 0  # number of finished epochs
        self.layers = find_sparse_layers(model, prune.keep, keep_first=self.settings.keep_first)
        put_on_sphere_(model, self.layers, self.settings.per)
        self.weights = [trained_weight(model.get_submodule(layer)) for layer in self.layers]

    def penalise_(self) -> None:
        """Add the gradient of the penalty. Call between backward and the optimizer's step."""
        progress = self.epoch / max(self.training.epochs, 1)
        strength = ramp_strength(progress, self.settings.strength)
        if strength:
            self.value(ramp_sparsity(progress, self.sparsity)).mul(strength).backward()  # type: ignore[no-untyped-call]

    def value(self, sparsity: float) -> Tensor:
        """Sum () the penalty over the layers."""
        values, per = [], self.settings.per
        for weight in self.weights:
            mask, direction = keep_largest(weight, sparsity, per), normalise(weight, per)
            match self.settings.penalty:
                case "ternary-cosine":
                    values.append(ternary_cosine(direction, mask))
                case "tail-energy":
                    values.append(tail_energy(direction, mask))
                case _:
                    assert_never(self.settings.penalty)
        return torch.stack(values).sum()

    def unwrap_(self, model: nn.Module) -> None:
        """Turn the layers into plain ones with their effective weights."""
        take_off_sphere_(model, self.layers)

"""Pruning On-the-Fly (arXiv 2212.12651): train once so that single weights can be cut afterwards at no cost.

Hyperspherical layers are trained with a penalty that pushes part of their weights away from zero and the rest to it
(polarise.py has the formulas, which are ours). What is then cut needs no retraining; one training serves every
sparsity. Unlike the other bases it removes no units: the model stays as wide as it was, with zeros or means in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, assert_never

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.graph import Groups
from dpm_cli.method.budget import Scores
from dpm_cli.method.pruners.base import BasePruner, Indices
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
    """Convolutions and linear layers whose weights may be cut, in order; weights that layers share are left alone.

    keep: names or patterns of layers that stay whole; a name covers the layers below it. keep_first: so does the first
    convolution.
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
    """Cut the small weights of plain layers and put in their place what is remembered of them.

    threshold: cut below so many root mean squares, rather than to a sparsity. Returns the mask of what was kept, by
    parameter.
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
    """The share of weights that the masks leave out."""
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


class OnTheFly(BasePruner):
    """The base pruner `on-the-fly`. Its penalty acts in the stage `sparse`; cutting follows when all is trained.

    sparsity: the share of weights that the penalty pushes to zero, when its ramp is over. epochs: of that stage. keep,
    keep_first: as for `find_sparse_layers`.
    """

    def __init__(
        self,
        *,
        penalty: Literal["ternary-cosine", "tail-energy"],
        strength: float,
        sparsity: float,
        per: Per,
        epochs: int,
        keep: Sequence[str],
        keep_first: bool,
    ) -> None:
        self.penalty, self.strength, self.sparsity, self.per = penalty, strength, sparsity, per
        self.epochs, self.keep, self.keep_first = epochs, keep, keep_first
        self.epoch = 0  # of the stage, those that are over
        self.layers: list[str] = []

    def choosable(self, groups: Groups, model: nn.Module) -> Groups:
        return groups.without(dict.fromkeys(range(len(groups)), WHY_WHOLE))

    def prepare_(self, model: nn.Module, groups: Groups) -> Groups:
        self.layers = find_sparse_layers(model, self.keep, keep_first=self.keep_first)
        put_on_sphere_(model, self.layers, self.per)
        return replace(groups, slices=())  # nothing is ever removed

    def restore_(self, model: nn.Module) -> None:
        take_off_sphere_(model, self.layers)

    def bind(self, groups: Groups, model: nn.Module, survivors: Indices | None = None) -> None:
        self.weights = [trained_weight(model.get_submodule(layer)) for layer in self.layers]

    def before_step_(self) -> None:
        progress = self.epoch / max(self.epochs, 1)
        strength = ramp_strength(progress, self.strength)
        if strength:
            self.value(ramp_sparsity(progress, self.sparsity)).mul(strength).backward()  # type: ignore[no-untyped-call]

    def value(self, sparsity: float) -> Tensor:
        """() the sum of the penalty over the layers."""
        values = []
        for weight in self.weights:
            mask, direction = keep_largest(weight, sparsity, self.per), normalise(weight, self.per)
            match self.penalty:
                case "ternary-cosine":
                    values.append(ternary_cosine(direction, mask))
                case "tail-energy":
                    values.append(tail_energy(direction, mask))
                case _:
                    assert_never(self.penalty)
        return torch.stack(values).sum()

    def end_epoch(self) -> None:
        self.epoch += 1

    def scores(self) -> Scores:
        return np.zeros(0)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = int(state["epoch"])

"""Measure how much accuracy each group is worth, by removing some of its units alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.data.splits import Split, sample
from dpm_cli.engine.evaluate import Score, evaluate_module
from dpm_cli.graph import Groups, Units
from dpm_cli.method.budget import Scores
from dpm_cli.results import GroupSensitivity


@dataclass(frozen=True)
class Taken:
    """Keeps some images of a split on their device, so that all groups are judged on the same images."""

    kept: tuple[tuple[Tensor, Tensor], ...]

    def batches(self, batch: int, *, seed: int, epoch: int, augment: None) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.kept


def take_images(split: Split, images: int, *, batch: int, seed: int) -> Taken:
    """Draw at most so many images of a split, of all classes."""
    some = split.select(sample(len(split), images, seed=seed))
    return Taken(tuple(some.batches(batch, seed=0, epoch=0, augment=None)))


def measure_sensitivity(
    model: nn.Module, groups: Groups, scores: Scores, split: Taken, *, share: float
) -> tuple[Score, list[GroupSensitivity]]:
    """Score the current model, and the model without a share of each group's lowest-scored units in turn.

    share: fraction of each group's units; at least one unit goes, and one stays. The weights are restored afterwards.
    """
    units = Units(groups, model)
    weights = [weight.clone() for weight in units.weights()]
    everything = np.ones(groups.units, bool)
    dense_macs = groups.cost.macs(everything)
    rows = []
    for group in groups:
        removed = min(max(1, round(share * group.size)), group.size - group.least)
        if removed < 1:
            continue
        alive = everything.copy()
        alive[group.start + np.argsort(scores[group.range], kind="stable")[:removed]] = False
        units.scale_(torch.from_numpy(alive).to(units.device, torch.float32))
        score = evaluate_module(model, split, batch=0)
        for weight, before in zip(units.weights(), weights):
            weight.copy_(before)
        saved = 1 - groups.cost.macs(alive) / dense_macs
        rows.append(GroupSensitivity(group.name, group.layers, group.size, removed, score.accuracy, score.loss, saved))
    return evaluate_module(model, split, batch=0), rows

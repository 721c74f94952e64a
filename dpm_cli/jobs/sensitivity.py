"""How much accuracy each group is worth: what is left of it when that group alone loses some of its units."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.data.splits import Split
from dpm_cli.engine.evaluate import Score, evaluate_module
from dpm_cli.graph import Groups, Units
from dpm_cli.method.budget import Scores
from dpm_cli.results import GroupSensitivity


@dataclass(frozen=True)
class FirstBatches:
    """Some images of a split, kept on their device: every group is judged on the same ones."""

    kept: tuple[tuple[Tensor, Tensor], ...]

    def batches(self, batch: int, *, seed: int, epoch: int, augment: None) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.kept


def take_images(split: Split, images: int, *, batch: int) -> FirstBatches:
    """The first images of a split, as many whole batches as needed."""
    batch = min(batch, images)
    batches = split.batches(batch, seed=0, epoch=0, augment=None)
    return FirstBatches(tuple(itertools.islice(batches, -(-images // batch))))


def measure_sensitivity(
    model: nn.Module, groups: Groups, scores: Scores, split: FirstBatches, *, share: float
) -> tuple[Score, list[GroupSensitivity]]:
    """The score of the model as it is, and of every group without a share of its lowest-scored units.

    share: fraction of each group's units; at least one goes, and one stays. Afterwards the weights are as before.
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

"""Plan what a recipe would do to a model: groups, achievable costs, widths. Nothing is trained or changed."""

import numpy as np
import torch
from torch import nn

from dpm_cli.engine.distributed import ALONE
from dpm_cli.graph.labels import Flags
from dpm_cli.method.budget import (
    Kind,
    Measure,
    Scores,
    Several,
    Weights,
    choose_victims,
    cost_of,
    find_limit,
    find_width_limits,
)
from dpm_cli.method.pruners import make_base
from dpm_cli.method.survey import survey
from dpm_cli.recipe import Recipe
from dpm_cli.recipe.values import COST_KINDS
from dpm_cli.report import KeptLayer, Width
from dpm_cli.results import Inspected, PlannedGroup, PlannedTarget
from dpm_cli.run.latency import Meter
from dpm_cli.sparse.on_the_fly import find_sparse_layers, find_whole_groups
from dpm_cli.sparse.polarise import count_kept

KINDS = COST_KINDS


class Plan:
    """Finds the groups of one module under one recipe. Raises what `find_groups` raises."""

    def __init__(self, module: nn.Module, recipe: Recipe, device: torch.device) -> None:
        """module: in eval mode on the CPU. device: of the run, on which a latency may be measured."""
        self.prune = prune = recipe.prune
        example = torch.zeros(2, *recipe.model.input)
        self.scores: Scores  # (units,) of the current weights
        self.weights: Weights | None = None
        latency: Measure | None = None
        if prune.target.sparsity:  # all units stay
            self.module, self.groups, self.round_to = module, find_whole_groups(module, example, prune), 1
            self.widths = find_width_limits(self.groups, round_to=1, min_keep=prune.min_keep)
            self.scores = np.zeros(0)
        else:
            base = make_base(prune, recipe.train, seed=recipe.seed)
            meter = Meter(prune.latency, recipe.model.input, ALONE, device)
            found = survey(module, example, prune, base, folds_means=recipe.folds_means, time_widths=meter.time_widths)
            latency = found.latency
            self.module, self.groups = found.module, found.groups
            self.round_to, self.widths = found.round_to, found.widths
            base.bind(self.groups, self.module)
            self.scores, self.weights = base.scores(), base.weights()
        everything, lowest = np.ones(self.groups.units, bool), self.widths.lowest(self.groups)
        self.dense: dict[str, int] = {kind: cost_of(self.groups.cost, kind, everything) for kind in KINDS}
        self.lowest: dict[str, int] = {kind: cost_of(self.groups.cost, kind, lowest) for kind in KINDS}
        self.amounts: dict[Kind, float] = {}
        self.amounts.update(prune.target.limits.items())
        if latency is not None and prune.target.latency is not None:
            self.amounts[latency] = prune.target.latency
            self.dense["latency"] = cost_of(self.groups.cost, latency, everything)
            self.lowest["latency"] = cost_of(self.groups.cost, latency, lowest)
        self.limits = {kind: find_limit(self.dense[str(kind)], amount) for kind, amount in self.amounts.items()}

    @property
    def is_achievable(self) -> bool:
        return all(self._can_meet(kind) for kind in self.limits)

    def _can_meet(self, kind: Kind) -> bool:
        return self.lowest[str(kind)] <= self.limits[kind] < self.dense[str(kind)]

    def survivors(self) -> Flags:
        """Return (units,) the survivors if all victims were chosen at once, by the current weights."""
        if not self.limits:
            return np.ones(self.groups.units, bool)
        kind = Several(tuple(self.limits.items()))
        return ~choose_victims(self.groups, self.widths, self.scores, self.weights, kind=kind, limit=Several.WHOLE)

    def describe(self, arch: str | None) -> Inspected:
        """Describe the plan. arch: the architecture that the recipe names."""
        alive = self.survivors() if self.is_achievable else None
        return Inspected(
            arch=arch,
            dense=self.dense,
            lowest=self.lowest,
            round_to=self.round_to,
            target=self._target(),
            groups=tuple(
                PlannedGroup(
                    name=group.name,
                    layers=tuple(group.layers),
                    units=group.size,
                    lowest=lowest,
                    planned=None if alive is None else int(alive[group.range].sum()),
                )
                for group, lowest in zip(self.groups, self.widths.least.tolist())
            ),
            kept=tuple(KeptLayer(kept.layer, kept.reason, kept.macs) for kept in self.groups.kept),
            planned=None if alive is None else self._costs(alive),
            widths=None if alive is None else tuple(Width(*each) for each in self.groups.widths(alive)),
        )

    def _costs(self, alive: Flags) -> dict[str, int]:
        kinds: list[Kind] = [*KINDS, *(kind for kind in self.limits if str(kind) not in KINDS)]
        return {str(kind): cost_of(self.groups.cost, kind, alive) for kind in kinds}

    def _target(self) -> PlannedTarget:
        target, sparse = self.prune.target, self.prune.on_the_fly
        if target.drop is not None and not self.limits:
            can_lose = self.lowest["macs"] < self.dense["macs"]
            return PlannedTarget("drop", target.drop, self.dense["macs"], can_lose)
        if not target.sparsity:
            each = [
                PlannedTarget(str(kind), self.amounts[kind], limit, self._can_meet(kind))
                for kind, limit in self.limits.items()
            ]
            return min(each, key=lambda planned: planned.is_achievable)  # one that cannot be met comes first
        layers = find_sparse_layers(self.module, self.prune.keep, keep_first=sparse.keep_first)
        left = count_kept((self.module.get_parameter(f"{layer}.weight") for layer in layers), target.sparsity[0])
        return PlannedTarget("sparsity", target.sparsity[0], left, self.is_achievable)

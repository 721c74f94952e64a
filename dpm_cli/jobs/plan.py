"""What a recipe would make of a model: groups, reachable costs, widths. Nothing is trained or changed."""

from typing import Any

import numpy as np
from torch import nn

from dpm_cli.graph.labels import Flags
from dpm_cli.method.budget import (
    Kind,
    Scores,
    choose_victims,
    cost_of,
    find_limit,
)
from dpm_cli.method.pruners import make_base
from dpm_cli.method.survey import survey
from dpm_cli.recipe import Recipe
from dpm_cli.sparse.on_the_fly import find_sparse_layers
from dpm_cli.sparse.polarise import count_kept

KINDS: tuple[Kind, ...] = ("macs", "params", "channels")


class Plan:
    """The groups of one module under one recipe. Raises what `find_groups` raises."""

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        """module: in eval mode on the CPU."""
        self.prune = prune = recipe.prune
        found = survey(module, recipe)
        self.module, self.groups = found.module, found.groups
        self.round_to, self.widths = found.round_to, found.widths
        everything, lowest = np.ones(self.groups.units, bool), self.widths.lowest(self.groups)
        self.dense = {kind: cost_of(self.groups.cost, kind, everything) for kind in KINDS}
        self.lowest = {kind: cost_of(self.groups.cost, kind, lowest) for kind in KINDS}
        self.kind: Kind
        if prune.target.sparsity:  # all units stay
            self.kind, self.limit = "params", self.dense["params"]
        else:
            self.kind, self.limit = prune.target.kind, find_limit(self.dense[prune.target.kind], prune.target.amount)
        base = make_base(recipe)
        base.bind(self.groups, self.module)
        self.scores: Scores = base.scores()  # (units,) of the weights as they are

    @property
    def is_achievable(self) -> bool:
        if self.prune.target.sparsity:
            return True
        return self.lowest[self.kind] <= self.limit < self.dense[self.kind]

    def survivors(self) -> Flags:
        """(units,) what would be left if all victims were chosen at once, from the weights as they are."""
        return ~choose_victims(self.groups, self.widths, self.scores, kind=self.kind, limit=self.limit)

    def _target(self) -> dict[str, Any]:
        target, sparse = self.prune.target, self.prune.on_the_fly
        if not target.sparsity:
            return {"kind": self.kind, "asked": target.amount, "limit": self.limit}
        layers = find_sparse_layers(self.module, self.prune.keep, keep_first=sparse.keep_first)
        left = count_kept((self.module.get_parameter(f"{layer}.weight") for layer in layers), target.sparsity[0])
        return {"kind": "sparsity", "asked": target.sparsity[0], "limit": left}

    def to_dict(self) -> dict[str, Any]:
        groups = [
            {"name": group.name, "layers": list(group.layers), "units": group.size, "lowest": units}
            for group, units in zip(self.groups, self.widths.least.tolist())
        ]
        result: dict[str, Any] = {
            "dense": self.dense,
            "round_to": self.round_to,
            "achievable": {kind: [self.lowest[kind], self.dense[kind]] for kind in KINDS},
            "target": self._target() | {"achievable": self.is_achievable},
            "groups": groups,
            "kept": [{"layer": kept.layer, "reason": kept.reason} for kept in self.groups.kept],
        }
        if self.is_achievable:
            alive = self.survivors()
            for values, group in zip(groups, self.groups):
                values["planned"] = int(alive[group.range].sum())
            result["planned"] = {kind: cost_of(self.groups.cost, kind, alive) for kind in KINDS}
            result["widths"] = [
                {"layer": layer, "before": before, "after": after} for layer, before, after in self.groups.widths(alive)
            ]
        return result

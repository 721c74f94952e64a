"""DepGraph (Fang et al., CVPR 2023): group-norm importance with global ranking, and its sparse learning.

Importance: for every layer of a group, Σ w² of the unit's rows, of its columns, or γ²; averaged over the layers;
divided by the group's mean or maximum so that groups can be ranked together. Biases are not counted. Other importances
and penalties can be selected by name.

`fisher` is the mean of ⟨x, g⟩² of a unit's weights x and their gradient g (Theis et al. 2018, arXiv 1801.05787), of all
layers that share the unit (Group Fisher Pruning, Liu et al., ICML 2021): up to a factor, what the loss would rise by
without it. So units are chosen by what is lost per cost saved. Both papers take the gradient of one image; here it is
that of a batch.

How this differs from the reference implementation: the victims of a round come from one ranking, while the reference
ranks again after each of up to 400 small steps; and equal importances within a group give a finite penalty.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.graph import Groups, Role, Slice, Units
from dpm_cli.method.budget import Scores, Weights
from dpm_cli.method.pruners.base import BasePruner, Indices
from dpm_cli.method.pruners.polar import polar_pulls
from dpm_cli.method.pruners.stack import Stack, stackable
from dpm_cli.method.rounds import Rounds, plan_rounds
from dpm_cli.recipe.sections import Decay, Importance, Prune, Training
from dpm_cli.recipe.stages import Stage

Normalizer = Literal["mean", "max"]


class GroupImportance:
    """Computes importances and the sparse-learning gradient of all units. Make a new one after compaction.

    Both sides of a unit count: the weights that produce its values and those that read them (full group of the paper,
    §3).
    """

    def __init__(self, groups: Groups, model: nn.Module) -> None:
        counted = (Role.PRODUCER, Role.NORM, Role.CONSUMER, Role.READER)
        slices: dict[str, list[Slice]] = {}
        for part in groups.slices:
            # As in the reference, depthwise rows do not count, and vectors only count as normalisation weights.
            is_vector = part.role in counted and model.get_parameter(part.tensor).dim() == 1
            if part.role in counted and (part.role is Role.NORM) == is_vector:
                slices.setdefault(part.tensor, []).append(part)
        batches = list(stackable(slices, model))
        self._stacks = [
            Stack([model.get_parameter(name) for name in names], [part.axis for part in slices[names[0]]])
            for names in batches
        ]
        parts = [
            part for names in batches for same_axis in zip(*(slices[name] for name in names)) for part in same_axis
        ]
        self.count, self.groups = groups.units, len(groups)
        device = self._stacks[0].parameters[0].device if self._stacks else torch.device("cpu")
        units = [torch.from_numpy(part.units) for part in parts] or [torch.zeros(0, dtype=torch.int64)]
        self._units = torch.cat(units).to(device)  # (entries,) the unit of every index along every axis
        self.group_of_unit = torch.from_numpy(groups.group_of_unit).to(device)
        layers = np.zeros(len(groups), np.int64)
        for part in parts:
            layers[np.unique(groups.group_of_unit[part.units[part.units < groups.units]])] += 1
        self._layers = torch.from_numpy(layers).to(device)[self.group_of_unit].clamp_min(1)  # (units,)

    def importance(self, power: Literal[1, 2] = 2) -> Tensor:
        """Compute (units,) the unit's sum of |w|^power, averaged over the layers of its group; not normalised."""
        sums = torch.zeros(self.count + 1, device=self._units.device)
        if self._stacks:
            entries = [part for stack in self._stacks for part in stack.sums(power)]
            sums = sums.index_add_(0, self._units, torch.cat(entries))
        return sums[: self.count] / self._layers

    def scores(self, normalizer: Normalizer, power: Literal[1, 2] = 2) -> Scores:
        """Divide (units,) importance by its group's mean or maximum; low is redundant. Waits for the device."""
        importance = self.importance(power).double()
        scale = torch.zeros(self.groups, dtype=importance.dtype, device=importance.device)
        scale = scale.scatter_reduce(
            0, self.group_of_unit, importance, "mean" if normalizer == "mean" else "amax", include_self=False
        )
        return (importance / scale.clamp_min(1e-30)[self.group_of_unit]).cpu().numpy()

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest and the smallest value in each unit's group, each (units,). values: (units,)"""
        zeros = torch.zeros(self.groups, dtype=values.dtype, device=values.device)
        top, bottom = (
            zeros.scatter_reduce(0, self.group_of_unit, values, extreme, include_self=False)[self.group_of_unit]
            for extreme in ("amax", "amin")
        )
        return top, bottom

    @torch.no_grad()
    def penalise_(self, strength: float, alpha: float = 4.0) -> None:
        """Add strength · γ · w to the gradients, γ = 2^(α (s_max − s)/(s_max − s_min)) ∈ [1, 2^α] (DepGraph, eq. 4).

        The weakest unit of a group is pushed hardest. Call between backward and the optimizer's step.
        """
        root = self.importance().sqrt()
        top, bottom = self.extremes(root)
        self.pull_(strength * torch.exp2(alpha * (top - root) / (top - bottom + 1e-8)))

    @torch.no_grad()
    def pull_(self, strengths: Tensor) -> None:
        """Add strengths · w to the gradients of both sides of every unit. strengths: (units,)"""
        strengths = torch.cat([strengths, strengths.new_zeros(1)])
        factors = iter(torch.split(strengths[self._units], [size for stack in self._stacks for size in stack.sizes]))
        for stack in self._stacks:
            stack.pull_([next(factors) for _ in stack.sizes])


class DepGraph(BasePruner):
    """Implements the base `depgraph`: one ranking over all groups, optionally after sparse learning.

    `taylor` and `fisher` judge by the gradients of `prune.observe_batches` batches before each round. Group norms stand
    in where none were seen, as in a plan without images.
    """

    def __init__(self, prune: Prune, training: Training, *, seed: int) -> None:
        self.settings, self.training, self.seed = prune, training, seed
        self.importance: Importance = prune.importance
        self.penalty = prune.penalty
        self.normalizer: Normalizer = prune.normalizer or ("max" if prune.sparse_epochs else "mean")
        if prune.importance in ("taylor", "fisher"):
            self.observes = prune.observe_batches
        self.title = prune.base if prune.importance == "group-norm" else f"{prune.base} ({prune.importance})"
        self._is_sparse = False  # during sparse learning

    def stages(self) -> Sequence[Stage]:
        prune = self.settings
        # The penalty replaces weight decay, as in DepGraph's own sparse learning.
        changes = {"epochs": prune.sparse_epochs, "lr": prune.sparse_lr, "weight_decay": 0.0}
        sparse = self.training.model_copy(update=changes)
        return [
            Stage("sparse", sparse, "prune.sparse_", penalises=True),
            Stage("train", self.training, "train.", prunes=True),
        ]

    def rounds(self, stages: Sequence[Stage], decay: Decay, *, steps_per_epoch: int) -> Rounds:
        steps = self.training.epochs * steps_per_epoch
        return plan_rounds(steps, self.settings, decay)

    def choosable(self, groups: Groups, model: nn.Module) -> Groups:
        """Keep groups whole that `bn-scale` cannot judge: those without a normalisation weight on every unit."""
        if self.importance != "bn-scale":
            return groups
        scaled = Scales(groups, model).per_unit.cpu().numpy() > 0
        bare = {
            i: "bn-scale needs a BatchNorm behind every channel"
            for i, g in enumerate(groups)
            if not scaled[g.range].all()
        }
        return groups.without(bare)

    def bind(self, groups: Groups, model: nn.Module, survivors: Indices | None = None) -> None:
        self.norms = GroupImportance(groups, model)
        self.units = Units(groups, model)
        self.scales = Scales(groups, model)
        self._shares: Weights = np.array([len(group.layers) / group.size for group in groups])
        if survivors is None:
            device = self.units.device
            self.evidence = torch.zeros(groups.units, device=device)  # sum of |⟨x, g⟩| or of ⟨x, g⟩² over batches
            self.seen = 0  # batches
            # Strengths of the penalty "growing".
            self.pulls = torch.full((groups.units,), self.settings.sparse_strength, device=device)
            drawn = torch.rand(groups.units, generator=torch.Generator().manual_seed(self.seed))
            self.drawn = drawn.to(device)  # scores of "random"
        else:
            index = torch.from_numpy(survivors).to(self.units.device)
            self.evidence, self.pulls, self.drawn = self.evidence[index], self.pulls[index], self.drawn[index]

    def enter(self, stage: Stage, model: nn.Module, step: int) -> None:
        self._is_sparse = stage.penalises

    def before_step_(self) -> None:
        if self._is_sparse:
            self._penalise_()

    def observe_(self) -> None:
        change = self.units.dot(self.units.weights(), self.units.gradients())  # (units,) ⟨x, g⟩
        change = change.square() if self.importance == "fisher" else change.abs()
        self.evidence = self.evidence + change.where(change.isfinite().all(), 0.0)
        self.seen += 1

    def forget_(self) -> None:
        self.evidence, self.seen = torch.zeros_like(self.evidence), 0

    def _penalise_(self) -> None:
        match self.penalty:
            case "group-norm":
                self.norms.penalise_(self.settings.sparse_strength)
            case "slimming":
                self.scales.penalise_(self.settings.sparse_strength)
            case "growing":
                self.norms.pull_(self.pulls)
            case "channel-polar":
                norms = self.norms.importance().sqrt()
                self.norms.pull_(
                    self.settings.sparse_strength * polar_pulls(norms, self.norms.group_of_unit, self.norms.groups)
                )

    def end_epoch(self) -> None:
        """Pull small units harder after each epoch of sparse learning (Wang et al., ICLR 2021)."""
        if self._is_sparse and self.penalty == "growing":
            importance = self.norms.importance()
            top, bottom = self.norms.extremes(importance)
            self.pulls = self.pulls + self.settings.sparse_growth * (top - importance) / (top - bottom + 1e-8)

    @property
    def _criterion(self) -> Importance:
        return "group-norm" if self.observes and not self.seen else self.importance

    @property
    def scores_are_losses(self) -> bool:
        return self._criterion == "fisher"

    def scores(self) -> Scores:
        match self._criterion:
            case "group-norm":
                return self.norms.scores(self.normalizer)
            case "l1":
                return self.norms.scores(self.normalizer, power=1)
            case "bn-scale":
                return self.scales.mean().double().cpu().numpy()
            case "taylor" | "fisher":
                return self.evidence.double().cpu().numpy()
            case "random":
                return self.drawn.double().cpu().numpy()

    def weights(self) -> Weights | None:
        """Let the scores of each layer add up to one, where they are relative to their group's; others are no shares.

        Inferred, not published: with ResNet-56 at equal latency the better of four (benchmarks/RESULTS.md).
        """
        return self._shares if self._criterion in ("group-norm", "l1") else None

    def state_dict(self) -> dict[str, Any]:
        return {"evidence": self.evidence, "seen": self.seen, "pulls": self.pulls, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("evidence", "pulls", "drawn"):
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(f"{name} of {tuple(state[name].shape)} for {len(self.evidence)} units")
            setattr(self, name, state[name].to(self.units.device))
        self.seen = int(state["seen"])


class Scales:
    """Ranks and shrinks units by their normalisation weights, as network slimming does (Liu et al., ICCV 2017)."""

    def __init__(self, groups: Groups, model: nn.Module) -> None:
        vectors = {
            part.tensor
            for part in groups.slices
            if part.role is Role.NORM and model.get_parameter(part.tensor).dim() == 1
        }
        self.units = Units(groups, model, only=vectors)
        self.per_unit = self.units.entries()  # (units,) number of weights that share a unit

    def mean(self) -> Tensor:
        """Average (units,) |γ| over the layers that share the unit."""
        return self.units.total([weight.abs() for weight in self.units.weights()]) / self.per_unit.clamp_min(1)

    def penalise_(self, strength: float) -> None:
        """Add the gradient of strength · Σ √(mean γ²), a lasso over the scales that share a unit: γ / √(mean γ²)."""
        weights = self.units.weights()
        squares = self.units.total([weight.square() for weight in weights]) / self.per_unit.clamp_min(1)
        factors = self.units.spread(strength / (squares + 1e-9).sqrt(), rest=0.0)
        for parameter, factor in zip(self.units.parameters, factors):
            if parameter.grad is not None:
                parameter.grad.addcmul_(parameter.detach(), factor)

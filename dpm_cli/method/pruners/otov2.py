"""OTOv2's dual half-space projected gradient (Chen et al., ICLR 2023), and the selection of its successor HESSO.

DHSPG trains with any optimizer. It first marks as redundant the groups that are small and that descent already shrinks.
From then on a penalty pushes each of them towards zero, as strongly as its gradient requires. A group is projected to
zero, or condemned, when a step leaves less than ε of its length along its old direction. Both stop at the target.

How this differs from the reference implementation: the optimizer is PyTorch's own, and its update (x − x̂)/lr, without
AdamW's decoupled decay, replaces the paper's gradient variant ĝ. The partition uses the gradient of the last step
before the penalty. The number of redundant groups follows from the target (MACs, parameters or units) by the same
scores. `upper_group_sparsity`, off by default there, is left out. A unit that is already zero is condemned at once. Of
the units condemned in one step, only as many go as the target needs. Dead units are removed at epoch ends, with the
weights that read them: removed consumer weights no longer count in other units' norms.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from dpm_cli.graph import Groups, Units
from dpm_cli.method.budget import Scores
from dpm_cli.method.pruners.base import BasePruner, Indices
from dpm_cli.method.rounds import Rounds, plan_each_step, plan_rounds
from dpm_cli.recipe.sections import Decay, Prune, Training
from dpm_cli.recipe.stages import Stage

TINY = 1e-8
WARM_UP = 1  # training steps to see before the first round
MOST = 0.999  # largest fraction of all units that may be marked as redundant


def salience(weight: Tensor, gradient: Tensor, dot: Tensor, entries: Tensor, live: Tensor) -> Tensor:
    """Score (units,) by DHSPG; high is redundant: the unit is small and descent shrinks it (OTOv2, §3.2).

    weight, gradient: (units,) ‖x‖ and ‖ĝ‖. dot: (units,) <x, ĝ>. entries: (units,) scalars per unit. live: (units,)
    neither decaying nor dead; only these balance the two criteria, as units near zero would make all others look
    equally large.
    """
    cosine = dot / (weight * gradient).clamp_min(TINY)
    smallness = 1 / (weight / entries.clamp_min(1) + 1e-6)
    criteria = torch.stack([cosine, smallness])  # (2, units)
    lengths = torch.linalg.vector_norm(criteria * live, dim=1, keepdim=True)
    mean: Tensor = (criteria / lengths.clamp_min(1e-30)).mean(0)
    return mean


def hesso_importance(weight: Tensor, gradient: Tensor, dot: Tensor, entries: Tensor, live: Tensor) -> Tensor:
    """Score (units,) by HESSO; low is redundant: the mean of five criteria, each of unit length over live units.

    The cosine has the opposite sign to DHSPG's, as in the reference code. Arguments as for `salience`.
    """
    criteria = (
        weight,
        weight / entries.clamp_min(1),
        dot / (weight * gradient).clamp_min(TINY) + 1,
        dot.abs(),
        0.5 * dot.square(),
    )
    return torch.stack([c / (((c * live).square().sum() + 1e-8).sqrt() + 1e-8) for c in criteria]).mean(0)


def penalty_strengths(
    weight: Tensor, gradient: Tensor, dot: Tensor, *, strength: float, amplify: float, ceiling: float
) -> Tensor:
    """Compute (units,) λ of every unit: at least `strength`, clipped to strength · ceiling.

    Where descent would lengthen the unit, λ_min < λ < λ_max shortens it while the loss still falls (OTOv2, §3.3).
    """
    grows = dot < 0
    outward = torch.where(grows, -dot, 1.0)
    lowest = outward / weight.clamp_min(TINY)  # λ_min
    highest = gradient.square() * weight / outward  # λ_max
    asked = (amplify * lowest).clamp(strength, strength * ceiling)
    asked = torch.where(asked >= highest, (lowest + highest) / 2, asked)
    return torch.where(grows, asked, strength)


class Otov2(BasePruner):
    """Implements the base `otov2`. `variant: hesso` chooses by HESSO's importance at each round, without projection.

    The settings `strength`, `amplify` and `ceiling` are lmbda, lmbda_amplify and hat_lmbda_coeff in the reference. The
    default strength is ours: three times what shrinks a typical marked unit to zero within its round at a constant
    learning rate, but at least `least_strength`. The reference's default assumes hundreds of epochs.
    `tolerance` is the fraction of all units that are marked as redundant beyond what the target needs.
    """

    def __init__(self, prune: Prune, training: Training) -> None:
        self.settings, self.training = prune, training
        self.variant = prune.otov2.variant
        self.pace = "steps" if self.variant == "dhspg" else "rounds"
        self.title = prune.base if self.variant == "dhspg" else f"{prune.base} ({self.variant})"
        self.is_partitioned = False
        self.used_strength = prune.otov2.strength or 0.0
        self._seen: dict[str, Tensor] = {}
        self._lr = 0.0  # of the last step with a non-zero learning rate
        self._has_moved = False  # whether the last step had a non-zero learning rate
        self._set_defaults(by_adam=training.optimizer != "sgd", decoupled_decay=0.0)

    def _set_defaults(self, *, by_adam: bool, decoupled_decay: float) -> None:
        """Take the reference's defaults for the optimizer. decoupled_decay: weight decay that bypasses the gradient."""
        self.least_strength = 1e-2 if by_adam else 1e-3
        self.amplify = self.settings.otov2.amplify or (20.0 if by_adam else 2.0)
        self.ceiling = self.settings.otov2.ceiling or (1e3 if by_adam else 10.0)
        self.decoupled_decay = decoupled_decay
        if not self.is_partitioned:
            self.used_strength = self.settings.otov2.strength or self.least_strength

    def meet(self, optimizer: Optimizer) -> None:
        group = optimizer.param_groups[0]
        is_decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, AdamW))
        decay = float(group.get("weight_decay", 0.0)) if is_decoupled else 0.0
        self._set_defaults(by_adam=not isinstance(optimizer, SGD), decoupled_decay=decay)

    def stages(self) -> Sequence[Stage]:
        return [Stage("train", self.training, "train.", prunes=True)]

    def rounds(self, stages: Sequence[Stage], decay: Decay, *, steps_per_epoch: int) -> Rounds:
        steps, plan = self.training.epochs * steps_per_epoch, plan_each_step if self.pace == "steps" else plan_rounds
        return plan(steps, self.settings, decay, warm_up=WARM_UP)

    def bind(self, groups: Groups, model: nn.Module, survivors: Indices | None = None) -> None:
        self.units = Units(groups, model)
        self._entries, self._group_of_unit = self.units.entries(), groups.group_of_unit
        if survivors is None:
            self.redundant = torch.zeros(groups.units, dtype=torch.bool, device=self.units.device)
            self.hits = torch.zeros_like(self.redundant)
            zeros = torch.zeros(groups.units, device=self.units.device)
            # Before any training (`dpm inspect`) there is no gradient, so the scores depend on the weights alone.
            self._seen = {"weight": self.units.norm(), "gradient": zeros, "dot": zeros, "live": zeros == 0}
        else:
            index = torch.from_numpy(survivors).to(self.units.device)
            self.redundant, self.hits = self.redundant[index], self.hits[index]
            self._seen = {name: values[index] for name, values in self._seen.items()}

    def before_step_(self) -> None:
        self._before = [weight.clone() for weight in self.units.weights()]  # x

    def start_round(self, redundant: int, steps: int) -> None:
        """Mark the units with the highest salience, but never a whole group (the partition of OTOv2, §3.2)."""
        if self.pace != "steps" or self.is_partitioned:
            return
        count = len(self._group_of_unit)
        number = int(min(redundant + self.settings.otov2.tolerance * count, MOST * count))
        scores = self.scores()
        marked = np.zeros(count, bool)
        marked[np.argsort(scores, kind="stable")[:number]] = True
        for group in np.unique(self._group_of_unit).tolist():
            units = np.flatnonzero(self._group_of_unit == group)
            if marked[units].all():
                marked[units[np.argmax(scores[units])]] = False
        self.redundant = torch.from_numpy(marked).to(self.units.device)
        self.is_partitioned = True
        if self.settings.otov2.strength is None:
            typical = float(self._seen["weight"][self.redundant].median()) if marked.any() else 0.0
            self.used_strength = max(self.least_strength, 3 * typical / max(self._lr * steps, 1e-12))

    @torch.no_grad()
    def after_step_(self, lr: float, going: Tensor) -> None:
        self._has_moved = lr > 0  # false if the schedule reached (almost) zero
        if not self._has_moved:
            return
        self._lr = lr
        before, after = self._before, self.units.weights()
        update = torch._foreach_sub(before, after)  # x − x̂ = lr ĝ, with decoupled decay in it
        weight, length, dot = self.units.norm(before), self.units.norm(update) / lr, self.units.dot(before, update) / lr
        decay = self.decoupled_decay
        if decay:  # ĝ = (x − x̂)/lr − decay · x
            length = (length.square() - 2 * decay * dot + (decay * weight).square()).clamp_min(0).sqrt()
            dot = dot - decay * weight.square()
        self._seen = {"weight": weight, "gradient": length, "dot": dot, "live": ~going}

    @torch.no_grad()
    def mark_(self, spared: Tensor) -> None:
        """Push redundant units, and mark those that a step turned from their old direction (half-space step, §3.3)."""
        if not (self._has_moved and self.is_partitioned):
            return
        weight, dot, lr = self._seen["weight"], self._seen["dot"], self._lr
        pushed = self.redundant & ~spared
        strengths = penalty_strengths(
            weight,
            self._seen["gradient"],
            dot,
            strength=self.used_strength,
            amplify=self.amplify,
            ceiling=self.ceiling,
        )
        push = torch.where(pushed, lr * strengths / (weight + TINY), 0.0)  # (units,) of x, taken from x̂
        self.units.add_(self._before, -push)
        # Computes <x̂, x> after the push without reading the weights again.
        square = weight.square()
        along = square - lr * (dot + self.decoupled_decay * square) - push * square
        self.hits |= pushed & (along < self.settings.otov2.epsilon * square)
        self.hits |= self._seen["live"] & (weight == 0)

    def marked(self) -> Tensor:
        return self.hits

    def scores(self) -> Scores:
        seen = (self._seen["weight"], self._seen["gradient"], self._seen["dot"], self._entries, self._seen["live"])
        scores = hesso_importance(*seen) if self.variant == "hesso" else -salience(*seen)
        as_numbers: Scores = scores.double().cpu().numpy()
        return as_numbers

    def state_dict(self) -> dict[str, Any]:
        return {
            "redundant": self.redundant,
            "hits": self.hits,
            "partitioned": self.is_partitioned,
            "seen": self._seen,
            "strength": self.used_strength,
            "lr": self._lr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device, shape = self.units.device, self.redundant.shape
        tensors = {"redundant": state["redundant"], "hits": state["hits"]} | state["seen"]
        if any(tensor.shape != shape for tensor in tensors.values()):
            raise ValueError(f"the state of otov2 is not of {shape[0]} units")
        self.redundant, self.hits = state["redundant"].to(device), state["hits"].to(device)
        self._seen = {name: state["seen"][name].to(device) for name in self._seen}
        self.is_partitioned = bool(state["partitioned"])
        self.used_strength, self._lr = float(state["strength"]), float(state["lr"])

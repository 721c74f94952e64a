"""Gate Decorator (You et al., NeurIPS 2019): a gate on every channel, judged by what the loss would lose without it.

BatchNorm's scale becomes a gate g that multiplies the whole channel, y = g · (x̂ + β/γ). Short "ticks" train only
gates, shifts and classifier and sum |∂L/∂g · g| over their batches; a round after each tick names victims by that sum,
added up over all gates that share a unit (residual joins). Longer "tocks" train everything, with an L1 penalty on the
gates. What decays is the gate; when it is zero, what it gates is removed.

How this differs from the reference implementation: a tick takes an equal share of the MACs that must go, or, as there,
a fixed fraction of the gates (`fraction`); the target is exact, because the last tick takes no more than it needs.
Where |β/γ| > 10 the reference clamps and so changes the function; here a fixed inner scale carries the rest exactly.
Optimizers start anew with each tick and tock, and the penalty on expensive feature maps (`flops_eta`, zero in the
reference's experiments) is left out. `round_to` and `min_keep` bound the widths.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpm_cli.graph import Groups, Role, Slice, Units
from dpm_cli.graph.labels import Flags, Ids
from dpm_cli.method.budget import Scores
from dpm_cli.method.pruners.base import BasePruner, Indices
from dpm_cli.method.stages import StageName

MOST_SHIFT = 10.0  # of a gated channel, in standard deviations of its input


class Gated(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm whose weight is a gate over scale and shift: y = weight · (inner · x̂ + bias)."""

    inner: Tensor  # (C,) fixed; 1 unless the shift would be larger than MOST_SHIFT

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        momentum = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a plain mean over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or self.running_mean is None
        tracked = not self.training or self.track_running_stats
        return F.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight * self.inner,
            self.weight * self.bias,
            by_batch,
            momentum,
            self.eps,
        )


class GatedBatchNorm1d(Gated, nn.BatchNorm1d):
    """Of (B, C) or (B, C, L)."""


class GatedBatchNorm2d(Gated, nn.BatchNorm2d):
    """Of (B, C, H, W)."""


class GatedBatchNorm3d(Gated, nn.BatchNorm3d):
    """Of (B, C, D, H, W)."""


GATED: dict[type[nn.Module], type[Gated]] = {
    nn.BatchNorm1d: GatedBatchNorm1d,
    nn.BatchNorm2d: GatedBatchNorm2d,
    nn.BatchNorm3d: GatedBatchNorm3d,
}
PLAIN = {gated: plain for plain, gated in GATED.items()}


@torch.no_grad()
def add_gates_(model: nn.Module) -> list[str]:
    """Turn every trainable BatchNorm into a gated one that computes the same. Returns their names.

    Where |β| > 10 |γ| (γ = 0 among them) the gate is |β|/10 and a fixed inner scale γ/g makes up for it.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and can_be_gated(module):
            scale, shift = module.weight.clone(), module.bias.clone()
            sign = torch.where(scale < 0, -1.0, 1.0)
            gate = torch.where(shift.abs() > MOST_SHIFT * scale.abs(), sign * shift.abs() / MOST_SHIFT, scale)
            divisor = torch.where(gate == 0, 1.0, gate)
            module.__class__ = GATED[type(module)]
            module.register_buffer("inner", torch.where(gate == scale, 1.0, scale / divisor))
            module.weight.copy_(gate)
            module.bias.copy_(shift / divisor)
            names.append(name)
    return names


@torch.no_grad()
def merge_gates_(model: nn.Module) -> None:
    """Turn gated BatchNorms back into plain ones that compute the same."""
    for module in model.modules():
        if isinstance(module, Gated):
            module.bias.mul_(module.weight)
            module.weight.mul_(module.inner)
            del module._buffers["inner"]
            module.__class__ = PLAIN[type(module)]  # type: ignore[assignment]


def can_be_gated(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module) in GATED and isinstance(weight, nn.Parameter) and weight.requires_grad


def below_threshold(scores: Scores, gates: Ids, group_of_unit: Ids, least: Ids, fraction: float) -> Flags:
    """(units,) which a tick of the reference masks: all below the score of the `fraction`-th part of the gates.

    gates: (units,) how many share a unit; each counts in the ranking. least: (groups,) units that stay whatever their
    score. Units that score zero go too, without counting.
    """
    free = np.zeros(len(scores), bool)  # those that their group can spare
    for group in np.unique(group_of_unit).tolist():
        units = np.flatnonzero(group_of_unit == group)
        free[units[np.argsort(scores[units], kind="stable")[: max(0, len(units) - int(least[group]))]]] = True
    ranked = free & (scores > 0)
    ladder = np.sort(np.repeat(scores[ranked], gates[ranked]))
    number = int(gates.sum() * fraction)
    if not len(ladder):
        return free
    below: Flags = free & (scores <= ladder[min(number, len(ladder) - 1)])
    return below


class GateDecorator(BasePruner):
    """The base pruner `gate-decorator`. strength: of the gates' L1 penalty in tocks. min_keep: fraction of every group
    that stays. fraction: of the gates masked after a tick; none: each tick takes its share of the target.
    """

    def __init__(self, *, strength: float, min_keep: float, fraction: float | None) -> None:
        self.strength, self.min_keep, self.fraction = strength, min_keep, fraction
        self.condemns = fraction is not None
        self._stage: StageName = "tock"
        self._is_new = True  # no step of this stage was taken yet
        self._frozen: list[str] = []  # names of parameters

    def choosable(self, groups: Groups, model: nn.Module) -> Groups:
        names = {f"{name}.weight" for name, module in model.named_modules() if can_be_gated(module)}
        gated = np.zeros(groups.units + 1, bool)
        for part in groups.slices:
            if part.tensor in names:
                gated[part.units] = True
        bare = {
            number: "gate-decorator needs a trainable BatchNorm behind every channel"
            for number, group in enumerate(groups)
            if not gated[group.range].all()
        }
        return groups.without(bare)

    def prepare_(self, model: nn.Module, groups: Groups) -> Groups:
        gated = set(add_gates_(model))
        inner = [
            Slice(f"{part.tensor.removesuffix('.weight')}.inner", 0, Role.BUFFER, part.units)
            for part in groups.slices
            if part.tensor.endswith(".weight") and part.tensor.removesuffix(".weight") in gated
        ]
        return replace(groups, slices=(*groups.slices, *inner))

    def restore_(self, model: nn.Module) -> None:
        self._thaw_(model)
        merge_gates_(model)

    def bind(self, groups: Groups, model: nn.Module, survivors: Indices | None = None) -> None:
        gates = self.decays(groups, model)
        self.gates, self._group_of_unit = gates, groups.group_of_unit
        self._sharing = gates.entries().cpu().numpy().astype(np.int64)  # (units,) gates of each
        if survivors is None:
            sizes = np.array([group.size for group in groups], np.int64)
            self._least = np.maximum(1, (self.min_keep * sizes).astype(np.int64))  # (groups,)
            # Before the first tick: a gate's size stands for its worth.
            self.sums = gates.total([gate.detach().abs() for gate in gates.parameters])
            self.marks = torch.zeros(groups.units, dtype=torch.bool, device=gates.device)
        else:
            index = torch.from_numpy(survivors).to(gates.device)
            self.sums, self.marks = self.sums[index], self.marks[index]

    def decays(self, groups: Groups, model: nn.Module) -> Units:
        """The gates alone: with them the channel is zero, whatever its filters are."""
        names = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, Gated) or can_be_gated(module)  # `dpm inspect` looks at a plain model
        }
        return Units(groups, model, only=names)

    def enter(self, stage: StageName, model: nn.Module, step: int) -> None:
        self._thaw_(model)
        if stage == "tick":
            convolutions = {n for n, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}
            for name, parameter in model.named_parameters():
                if name.rpartition(".")[0] in convolutions and parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._frozen.append(name)
        self._is_new = step == 0
        self._stage = stage

    def before_step_(self) -> None:
        weights, gradients = self.gates.weights(), self.gates.gradients()
        if self._stage == "tick":
            if self._is_new:  # the round after the tick before may have been in between
                self.sums, self._is_new = torch.zeros_like(self.sums), False
            self.sums = self.sums + self.gates.total([(w * g).abs() for w, g in zip(weights, gradients)])
        else:
            for gate, weight in zip(self.gates.parameters, weights):
                if gate.grad is not None:
                    gate.grad.add_(weight.sign(), alpha=self.strength)

    def condemned(self) -> Tensor:
        below = below_threshold(self.scores(), self._sharing, self._group_of_unit, self._least, self.fraction or 0.0)
        self.marks |= torch.from_numpy(below).to(self.marks.device)
        return self.marks

    def scores(self) -> Scores:
        return self.sums.double().cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "marks": self.marks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["sums"].shape != self.sums.shape or state["marks"].shape != self.marks.shape:
            raise ValueError(f"the state of gate-decorator is not of {len(self.sums)} units")
        self.sums, self.marks = state["sums"].to(self.gates.device), state["marks"].to(self.gates.device)

    def _thaw_(self, model: nn.Module) -> None:
        for name in self._frozen:  # by name: parameters are replaced when units are removed
            model.get_parameter(name).requires_grad_(True)
        self._frozen = []

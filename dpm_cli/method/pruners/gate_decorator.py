"""Gate Decorator (You et al., NeurIPS 2019): put a gate on every channel and judge it by its effect on the loss.

BatchNorm's scale becomes a gate g that multiplies the whole channel, y = g · (x̂ + β/γ). Short "ticks" train only
gates, shifts and classifier and sum |∂L/∂g · g| over their batches. A round after each tick picks victims by that sum,
added up over all gates that share a unit (residual joins). Longer "tocks" train everything, with an L1 penalty on the
gates. Only the gate decays; once it is zero, its channel is removed.

How this differs from the reference implementation: a tick removes an equal share of the MACs that must go or, as there,
a fixed fraction of the gates (`fraction`). The target is exact, as the last tick removes no more than needed. Where
|β/γ| > 10 the reference clamps and so changes the function; here a fixed inner scale keeps it exact. Each tick and tock
has a new optimizer, and the penalty on expensive feature maps (`flops_eta`, zero in the reference's experiments) is
left out. With a teacher (`train.distill`), tocks learn from it, ticks from the labels alone. `round_to` and `min_keep`
bound the widths.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.errors import RecipeError
from dpm_cli.graph import Groups, Role, Slice, Units
from dpm_cli.graph.labels import Flags, Ids
from dpm_cli.layers.gated import Gated, add_gates_, can_be_gated, merge_gates_
from dpm_cli.method.budget import Scores
from dpm_cli.method.pruners.base import BasePruner, Indices
from dpm_cli.method.rounds import MOST_ROUNDS, Rounds, count_taken, longest_decay, require_no_reselection
from dpm_cli.recipe.sections import Decay, Prune, Training
from dpm_cli.recipe.stages import Stage

MOST_TICKS = 10_000  # that it plans
FEW = 0.1  # fraction of the gates that `prune.rounds: auto` leaves unmasked if gates.fraction is set


def below_threshold(scores: Scores, gates: Ids, group_of_unit: Ids, least: Ids, fraction: float) -> Flags:
    """Find (units,) what a tick of the reference masks: units that score below the `fraction` quantile of gates.

    gates: (units,) number of gates per unit; each counts in the ranking. least: (groups,) number of units that must
    stay. Units that score zero are masked too, but do not count.
    """
    free = np.zeros(len(scores), bool)  # units that their group can spare
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


def plan_ticks(stages: Sequence[Stage], decay: Decay, *, steps_per_epoch: int, is_exact: bool) -> Rounds:
    """Plan a round in the stage after every tick. Raises RecipeError if its decay does not fit there.

    is_exact: rounds that release no units meet the target, so no further one must fit after the last.
    """
    starts: list[int] = []
    rooms: list[tuple[int, str]] = []  # steps and names of the stages in which rounds take place
    step = 0
    for stage in (stage for stage in stages if stage.prunes):
        length = stage.training.epochs * steps_per_epoch
        if starts:
            rooms.append((length, stage.name))
        step += length
        if stage.name == "tick":
            starts.append(step)
    if not starts or starts[-1] == step:
        raise RecipeError("train.epochs is 0, but that is a tock, in which the last units decay")
    last, (room, name) = step - starts[-1], min(rooms)
    decay_steps = max(1, min(longest_decay(step), room, last // 2)) if decay.steps == "auto" else decay.steps
    if room < count_taken(decay_steps):
        raise RecipeError(f"{decay_steps} decay steps do not fit into a {name} of {room} steps")
    if not is_exact:
        require_no_reselection(decay, "with prune.gates.fraction a tick takes what it marks")
    after = 2 if decay_steps == 1 else 2 * decay_steps  # one-step pruning also happens before a step
    may_release = decay.may_fall_short(in_rounds=is_exact) and decay_steps > 1
    if (may_release or not is_exact) and last < after:
        raise RecipeError(
            f"a tock of {last} steps has no room for two times {decay_steps} decay steps, of the last "
            "tick's units and of what the target then still needs"
        )
    return Rounds(tuple(starts), step, decay_steps)


class GateDecorator(BasePruner):
    """Implements the base `gate-decorator`.

    Each tick marks `prune.gates.fraction` of the gates if that is set, else its share of the target.
    """

    def __init__(self, prune: Prune, training: Training) -> None:
        self.settings, self.training = prune, training
        self.pace = "rounds" if prune.gates.fraction is None else "ticks"
        self.title = prune.base
        self._is_tick = False
        self._is_new = True  # before the first step of this stage
        self._frozen: list[str] = []  # names of parameters

    @property
    def ticks(self) -> int:
        """Return the number of ticks; by default those that fixed fractions need to leave few gates."""
        rounds, fraction = self.settings.rounds, self.settings.gates.fraction
        if rounds != "auto":
            return rounds
        return MOST_ROUNDS if fraction is None else min(MOST_TICKS, math.ceil(math.log(FEW) / math.log1p(-fraction)))

    def stages(self) -> Sequence[Stage]:
        """Alternate ticks, one per round, with tocks: first, last and every `ticks_per_tock` (Gate Decorator, §3.3)."""
        rounds, gates = self.ticks, self.settings.gates
        changes = {"epochs": gates.tick_epochs, "lr": gates.tick_lr, "schedule": "constant", "warmup_epochs": 0.0}
        if self.training.distill < 1:  # with labels, gates are judged by the task: by the teacher they rank worse
            changes["distill"] = 0.0
        tick = Stage(
            "tick", self.training.model_copy(update=changes), "prune.gates.tick_", prunes=True, ends_with_pruning=True
        )
        tock = Stage("tock", self.training, "train.", prunes=True, ends_with_pruning=True)
        stages = [tock]
        for number in range(1, rounds + 1):
            stages += [tick, tock] if number % gates.ticks_per_tock == 0 or number == rounds else [tick]
        return stages

    def rounds(self, stages: Sequence[Stage], decay: Decay, *, steps_per_epoch: int) -> Rounds:
        return plan_ticks(stages, decay, steps_per_epoch=steps_per_epoch, is_exact=self.pace == "rounds")

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
        self._sharing = gates.entries().cpu().numpy().astype(np.int64)  # (units,) number of gates
        if survivors is None:
            sizes = np.array([group.size for group in groups], np.int64)
            self._least = np.maximum(1, (self.settings.min_keep * sizes).astype(np.int64))  # (groups,)
            # Before the first tick, score a gate by its size.
            self.sums = gates.total([gate.detach().abs() for gate in gates.parameters])
            self.marks = torch.zeros(groups.units, dtype=torch.bool, device=gates.device)
        else:
            index = torch.from_numpy(survivors).to(gates.device)
            self.sums, self.marks = self.sums[index], self.marks[index]

    def decays(self, groups: Groups, model: nn.Module) -> Units:
        """Let only the gates decay: a zero gate makes the channel zero, whatever its filters are."""
        names = {
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, Gated) or can_be_gated(module)  # `dpm inspect` looks at a plain model
        }
        return Units(groups, model, only=names)

    def enter(self, stage: Stage, model: nn.Module, step: int) -> None:
        self._thaw_(model)
        self._is_tick = stage.name == "tick"
        if self._is_tick:
            convolutions = {n for n, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}
            for name, parameter in model.named_parameters():
                if name.rpartition(".")[0] in convolutions and parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._frozen.append(name)
        self._is_new = step == 0

    def before_step_(self) -> None:
        weights, gradients = self.gates.weights(), self.gates.gradients()
        if self._is_tick:
            self._change = self.gates.total([(w * g).abs() for w, g in zip(weights, gradients)])  # (units,)
        else:
            for gate, weight in zip(self.gates.parameters, weights):
                if gate.grad is not None:
                    gate.grad.add_(weight.sign(), alpha=self.settings.gates.strength)

    def after_step_(self, lr: float, going: Tensor) -> None:
        """Count what the step saw; a step that a gradient scaler skips may hold gradients that are not finite."""
        if self._is_tick:
            if self._is_new:  # the round of the previous tick may have come in between
                self.sums, self._is_new = torch.zeros_like(self.sums), False
            self.sums = self.sums + self._change

    def marked(self) -> Tensor:
        fraction = self.settings.gates.fraction or 0.0
        below = below_threshold(self.scores(), self._sharing, self._group_of_unit, self._least, fraction)
        self.marks |= torch.from_numpy(below).to(self.marks.device)
        return self.marks

    def unmark_(self, released: Tensor) -> None:
        """Let the next tick judge released units anew. The reference, which releases none, never withdraws a mark."""
        self.marks = self.marks & ~released

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

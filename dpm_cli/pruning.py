"""The pruning side of a run: rounds of victims that decay, are released or die, and are removed.

One object holds everything that changes with the structure of the model, so that a run can compact at any round's end
and a checkpoint can restore it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.budget import Floors, Kind, choose_victims, cost_of
from dpm_cli.decay import Decay
from dpm_cli.errors import RecipeError, RunError
from dpm_cli.graph import Groups, Units, compact_
from dpm_cli.graph.compact import KeptPositions
from dpm_cli.graph.labels import Flags
from dpm_cli.pruners.base import BasePruner
from dpm_cli.rectify import Rectifier

FoldMeans = Callable[[Groups, Flags], None]  # (groups, alive): let the readers of units that go take their means
MakeRectifier = Callable[[Tensor, int], Rectifier]  # (group of each unit, number of groups) -> a fresh one
COMPACT_TOLERANCE = 1e-5  # relative to the largest output


def plan_rounds(
    steps: int, *, rounds: int, decay_steps: int, start: float, end: float, rectify: bool
) -> tuple[int, ...]:
    """The first step of every round in a stage of `steps`. start, end: fractions of the stage.

    Rounds are spread evenly; each takes `decay_steps` (one-step pruning takes none). With releases, one more round
    must fit after the last to top up. A stage of no steps has one round, which cuts at once. Raises RecipeError if
    they do not fit.
    """
    if not steps:
        return (0,)
    taken = 0 if decay_steps == 1 else decay_steps
    first, last = round(start * steps), round(end * steps)
    room = (last - first) // rounds
    if room < max(taken, 1):
        raise RecipeError(
            f"{rounds} rounds of {decay_steps} decay steps do not fit between prune.start and prune.end (steps {first} "
            f"to {last} of {steps}): lower prune.rounds or decay.steps, or raise train.epochs or prune.end"
        )
    if rectify and last + taken > steps:
        raise RecipeError(
            f"no room for {decay_steps} decay steps after prune.end (step {last} of {steps}) to replace released "
            "units: lower prune.end or decay.steps, raise train.epochs, or set decay.rectify: false"
        )
    return tuple(first + i * room for i in range(rounds))


@dataclass(frozen=True)
class Removal:
    """What a round's end removed."""

    removed: int
    released: int
    difference: float  # largest relative difference of outputs before and after
    kept: KeptPositions  # of every tensor that lost positions, for the optimizer's state


class Pruning:
    """The structure of one model during a run. `model` is changed in place.

    Drive it from a stage's loop: `start_round` when `is_due`, `decay.observe` and `decay.advance_` around the
    optimizer's step, `finish_round` when `is_over`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        base: BasePruner,
        *,
        kind: Kind,
        limit: int,
        floors: Floors,
        starts: Sequence[int],
        decay_steps: int,
        envelope: Any = "exact",
        make_rectifier: MakeRectifier | None = None,
        fold_means: FoldMeans | None = None,
    ) -> None:
        """fold_means: called before units are cut at once; units that decay leave nothing behind."""
        self.model, self.groups, self.base = model, groups, base
        self.kind, self.limit, self.floors = kind, limit, floors
        self.starts, self.fold_means = tuple(starts), fold_means
        self.dense_cost = self.cost()
        self.survivors = np.ones(groups.units, bool)  # of the dense model's units
        self.round = 0  # rounds started
        self.in_round = False  # victims were chosen, and not all of them are dead or released
        self.chosen = self.released = 0
        self.units = Units(groups, model)
        group_of_unit = torch.from_numpy(groups.group_of_unit).to(self.units.device)
        rectifier = make_rectifier(group_of_unit, len(groups)) if make_rectifier else None
        self.decay = Decay(self.units, steps=decay_steps, envelope=envelope, rectifier=rectifier)
        base.bind(groups, model)

    def cost(self, alive: Flags | None = None) -> int:
        """The target's kind of cost, of the model as it is or of some survivors."""
        return cost_of(self.groups.cost, self.kind, self.all_alive if alive is None else alive)

    @property
    def all_alive(self) -> Flags:
        """(units,) nothing is removed from the model as it is."""
        return np.ones(self.groups.units, bool)

    @property
    def is_done(self) -> bool:
        """All rounds are over, the target is met, and releases have left no width between two allowed ones."""
        present = np.array([group.size for group in self.groups], np.int64)
        planned = self.round >= len(self.starts) and not self.in_round
        return planned and self.cost() <= self.limit and bool(self.floors.are_widths_allowed(present).all())

    def is_due(self, step: int) -> bool:
        """Whether a round starts before this step of the stage: a planned one, or one more to replace released
        units.
        """
        if self.in_round or self.is_done:
            return False
        return step >= self.starts[self.round] if self.round < len(self.starts) else True

    @property
    def is_over(self) -> bool:
        """Whether the current round's decays are all finished."""
        return self.in_round and self.decay.remaining == 0

    def start_round(self) -> dict[str, int]:
        """Choose victims for this round's share of the target and let them decay."""
        self.round += 1
        rounds = len(self.starts)
        planned = self.round <= rounds
        limit = self.limit
        if planned:
            limit = self.dense_cost - (self.dense_cost - self.limit) * self.round // rounds
        # A released unit rests for one round; the topping-up round takes what it must.
        eligible = ~self.decay.released.cpu().numpy() if planned else None
        victims = choose_victims(
            self.groups, self.floors, self.base.scores(), kind=self.kind, limit=limit, eligible=eligible
        )
        if self.fold_means and self.decay.steps == 1:
            self.fold_means(self.groups, ~victims)
        self.decay.start(victims, rectify=planned)
        self.in_round = True
        self.chosen += int(victims.sum())
        return {
            "round": self.round,
            "rounds": rounds,
            "chosen": int(victims.sum()),
            "limit": limit,
            "predicted_macs": self.groups.cost.macs(~victims),
            "predicted_params": self.groups.cost.parameters(~victims),
        }

    def finish_round(self, images: Tensor) -> Removal:
        """Remove the dead units physically and check that nothing else changed.

        images: (B, C, H, W) real inputs for the check. Raises RunError if outputs differ by more than 1e-5.
        """
        dead = self.decay.dead.cpu().numpy()
        released = int(self.decay.released.sum())
        self.in_round = False
        self.released += released
        if not dead.any():
            return Removal(0, released, 0.0, {})
        before = _outputs(self.model, images)
        kept = compact_(self.model, self.groups, ~dead)
        difference = _relative_difference(before, _outputs(self.model, images))
        if not difference <= COMPACT_TOLERANCE:
            raise RunError(
                f"removing {int(dead.sum())} dead units changed the outputs by {difference:.1e} (allowed "
                f"{COMPACT_TOLERANCE:.0e}), so the run stops; please report this model"
            )
        self._rebind(~dead)
        return Removal(int(dead.sum()), released, difference, kept)

    def _rebind(self, alive: Flags) -> None:
        self.survivors[np.flatnonzero(self.survivors)[~alive]] = False
        self.groups = self.groups.survivors(alive)
        self.units = Units(self.groups, self.model)
        self.decay.rebind(self.units, alive)
        if self.decay.rectifier:
            group_of_unit = torch.from_numpy(self.groups.group_of_unit).to(self.units.device)
            self.decay.rectifier.bind(group_of_unit, len(self.groups))
        self.base.bind(self.groups, self.model)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights."""
        return {
            "survivors": torch.from_numpy(self.survivors),
            "round": self.round,
            "in_round": self.in_round,
            "chosen": self.chosen,
            "released": self.released,
            "decay": self.decay.state_dict(),
            "base": self.base.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. The model is still dense: it loses what was removed, then takes the weights."""
        alive = state["survivors"].numpy()
        if alive.shape != (self.groups.units,) or alive.dtype != bool:
            raise ValueError(f"survivors {alive.shape} of {self.groups.units} units")
        compact_(self.model, self.groups, alive)
        self._rebind(alive)
        self.round, self.in_round = int(state["round"]), bool(state["in_round"])
        self.chosen, self.released = int(state["chosen"]), int(state["released"])
        self.decay.load_state_dict(state["decay"])
        self.base.load_state_dict(state["base"])


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Outputs in eval mode and full precision."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        cudnn = torch.backends.cudnn
        with torch.no_grad(), cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):  # TF32 alone is off by 1e-3
            return list(_tensors(model(images)))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for value in values for tensor in _tensors(value)] if values else []


def _relative_difference(before: list[Tensor], after: list[Tensor]) -> float:
    differences = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in zip(before, after, strict=True)
    ]
    return max(differences, default=0.0)

"""Prune in rounds: victims decay, then are released or die, and dead units are removed.

One object holds everything that changes with the structure of the model, so that a run can compact at any round's end
and a checkpoint can restore it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from dpm_cli.events import Event, Note, UnitsRemoved
from dpm_cli.graph import Groups, Kept, Units, compact_
from dpm_cli.graph.compact import KeptPositions
from dpm_cli.graph.labels import Flags
from dpm_cli.graph.program import Example
from dpm_cli.method.budget import Kind, Scores, Several, WidthLimits, choose_victims, cost_of, show_cost
from dpm_cli.method.decay import Decay
from dpm_cli.method.pruners.base import BasePruner
from dpm_cli.method.removal import Ancestry, Removal, check_removal
from dpm_cli.method.reselect import make_rectifier
from dpm_cli.method.rounds import Rounds
from dpm_cli.recipe import sections

FoldMeans = Callable[
    [Groups, Flags], None
]  # (groups, alive): fold the means of removed units into the layers that read them


@dataclass(frozen=True)
class Goal:
    """Bounds what may remain: at most `limit` of a kind of cost, in allowed widths."""

    kind: Kind
    limit: int
    widths: WidthLimits
    asked: Mapping[Kind, tuple[float, int]] = field(default_factory=dict)  # kind -> as in the recipe, and its limit
    is_open: bool = False  # the limit is as low as it gets, so that to stay above it is no failure

    def __str__(self) -> str:
        if not self.asked:
            return f"{self.kind} <= {self.limit:,}"
        return " and ".join(f"{kind} <= {show_cost(kind, limit)}" for kind, (_, limit) in self.asked.items())

    def describe(self, cost: int) -> str:
        """Write a cost of this kind; of several limits, the share that is used of the tightest."""
        if isinstance(self.kind, Several):
            return f"{cost / Several.WHOLE:.3f} of the tightest"
        return show_cost(self.kind, cost)


@dataclass(frozen=True)
class Choice:
    """Describes what the start of a round chose, and the cost that it will lead to."""

    round: int
    rounds: int  # number of planned rounds
    chosen: int
    condemning: bool  # units are chosen step by step during the round
    limit: int
    predicted_macs: int
    predicted_params: int


class Pruning:
    """Changes the structure of one model in place during a run.

    Drive it from a training loop: `start_round` when `is_due`, `before_step_` and `after_step_` around the optimizer's
    step, `finish_round` when `is_over`. Steps are counted over all stages that prune.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        base: BasePruner,
        goal: Goal,
        rounds: Rounds,
        decay: sections.Decay,
        *,
        fold_means: FoldMeans | None = None,
    ) -> None:
        """fold_means: called before units are cut at once. Decayed units output zero, so they have no means to fold."""
        self.model, self.base, self.goal, self.rounds, self.fold_means = model, base, goal, rounds, fold_means
        self.wanted = goal.limit  # that of the goal is higher if layers turn out to have to stay whole
        self.groups = groups = base.prepare_(model, groups)
        self.is_prepared = True
        self.dense_cost = self.cost()
        self.ancestry = Ancestry(groups)
        self.round = 0  # rounds started
        self.skipped = 0  # planned rounds that were not
        self.in_round = False  # some victims are neither dead nor released yet
        self.is_choosing = False  # the round still chooses units, at most until `rounds.end`
        self.chosen = self.released = 0
        self.topped_up = 0  # units chosen beyond the planned rounds
        self.units, whole = self._find_units()
        group_of_unit = torch.from_numpy(groups.group_of_unit).to(self.units.device)
        rectifier = make_rectifier(decay.rectify, group_of_unit, len(groups), in_rounds=base.pace == "rounds")
        self.decay = Decay(
            self.units, steps=rounds.decay_steps, envelope=decay.envelope, rectifier=rectifier, whole=whole
        )
        base.bind(groups, model)

    def cost(self, alive: Flags | None = None) -> int:
        """Return the cost, in the unit of the target, of the current model or of some survivors."""
        return cost_of(self.groups.cost, self.goal.kind, self.all_alive if alive is None else alive)

    @property
    def all_alive(self) -> Flags:
        """Return (units,) true for all units of the current model."""
        return np.ones(self.groups.units, bool)

    @property
    def is_met(self) -> bool:
        """Tell whether the current model meets the target in allowed widths only."""
        return self._would_meet(self.all_alive)

    def _would_meet(self, alive: Flags) -> bool:
        widths = np.bincount(self.groups.group_of_unit[alive], minlength=len(self.groups))
        return self.cost(alive) <= self.goal.limit and bool(self.goal.widths.are_widths_allowed(widths).all())

    @property
    def is_planned(self) -> bool:
        """Tell whether a planned round is still to come."""
        return self.round + self.skipped < len(self.rounds.starts)

    @property
    def is_done(self) -> bool:
        """Tell whether the target is met and no round is in progress, nor, at pace "rounds", still planned.

        An open goal is met when no round is planned, too.
        """
        if self.in_round or (self.is_planned and self.base.pace == "rounds" and not self.goal.is_open):
            return False
        return (self.goal.is_open and not self.is_planned) or self.is_met

    def is_due(self, step: int) -> bool:
        """Tell whether a round starts before this step: a planned one, or a further one to replace released units."""
        if self.in_round or self.is_done:
            return False
        return step >= self.rounds.starts[self.round + self.skipped] if self.is_planned else True

    def skip_round(self) -> None:
        """Go on training in the time of the planned round that is due. Its share of the target is not made up for."""
        self.skipped += 1

    @property
    def is_over(self) -> bool:
        """Tell whether all decays of the current round are finished."""
        return self.in_round and not self.is_choosing and self.decay.remaining == 0

    def start_round(self) -> Choice:
        """Choose victims for this round's share of the target and let them decay.

        A base that marks units sets its own pace, limited only by the target. Rounds beyond the planned ones choose the
        missing units by score alone and release none. A unit that was just released is spared in this round: decay has
        made it small, so it would be the first to be chosen again. It is only taken back if the target needs it.
        """
        is_planned = self.is_planned or self.goal.is_open
        self.round += 1
        scores, present = self.base.scores(), self._present
        limit, eligible = self.goal.limit, ~self.decay.released.cpu().numpy()
        if is_planned and self.base.pace != "rounds":
            eligible &= self.base.marked().cpu().numpy()
        elif is_planned:
            limit = self._limit_of_round()
        choose = partial(_choose, self, scores, alive=present)
        self.is_choosing = is_planned and self.base.pace == "steps"
        if self.is_choosing:
            self.base.start_round(int(choose(limit=limit).sum()), self.rounds.end - self.rounds.starts[0])
        victims = choose(limit=limit, eligible=eligible)
        if not is_planned and not self._would_meet(present & ~victims):
            victims = choose(limit=limit)
        if self.fold_means and self.decay.steps == 1:
            self.fold_means(self.groups, ~victims)
        self.base.forget_()
        self.decay.start(victims, rectify=is_planned, scores=scores)
        self.in_round = True
        self.chosen += int(victims.sum())
        self.topped_up += 0 if is_planned else int(victims.sum())
        return Choice(
            round=self.round,
            rounds=len(self.rounds.starts),
            chosen=int(victims.sum()),
            condemning=self.is_choosing,
            limit=limit,
            predicted_macs=self.groups.cost.macs(present & ~victims),
            predicted_params=self.groups.cost.parameters(present & ~victims),
        )

    def _limit_of_round(self) -> int:
        """Return the cost that this planned round may leave."""
        return self.dense_cost - (self.dense_cost - self.goal.limit) * self.round // len(self.rounds.starts)

    def before_step_(self) -> None:
        """Call between backward and the optimizer's step."""
        if self.in_round:
            self.decay.observe()
        self.base.before_step_()

    def after_step_(self, step: int, lr: float) -> None:
        """Call after the optimizer's step, with its learning rate."""
        decay, is_wanted = self.decay, self.is_choosing and not self._meets_target()
        self.base.after_step_(lr, decay.decaying | decay.dead)
        if is_wanted:
            self.base.mark_(decay.decaying | decay.dead | decay.released)
            _choose_marked(self)
        if self.in_round:
            decay.advance_()
            _choose_again(self)
        if self.is_choosing and (step + 1 >= self.rounds.end or (not decay.remaining and self._meets_target())):
            self.is_choosing = False

    @property
    def _present(self) -> Flags:
        """Return (units,) which units are neither decaying nor dead. Waits for the device."""
        return np.asarray((~(self.decay.decaying | self.decay.dead)).cpu())

    def _meets_target(self) -> bool:
        return self.cost(self._present) <= self.goal.limit

    def finish_round(self, example: Example) -> Removal:
        """Remove the dead units physically, but not those whose removal would change the outputs for this example."""
        released = int(self.decay.released.sum())
        self.in_round = False
        self.released += released
        self.base.unmark_(self.decay.released)
        return replace(self.remove_dead(example), released=released)

    @property
    def has_dead(self) -> bool:
        """Tell whether units can be removed in the middle of a round; at pace "steps" a round lasts long."""
        return self.is_choosing and bool(self.decay.dead.any())

    def remove_dead(self, example: Example) -> Removal:
        """Remove the dead units while others go on decaying. Raises what `check_removal` raises."""
        dead = self.decay.dead.cpu().numpy()
        if not dead.any():
            return Removal(0, 0, 0.0, {}, {})
        difference, culprits = check_removal(self.model, example, self.groups, dead)
        held, before = self._hold(culprits), dict(self.model.named_parameters(remove_duplicate=False))
        dead = self.decay.dead.cpu().numpy()
        return Removal(int(dead.sum()), 0, difference, self._compact_(~dead), before, held)

    def _compact_(self, alive: Flags) -> KeptPositions:
        kept = compact_(self.model, self.groups, alive)
        self.ancestry.lose(~alive)
        self._rebind(self.groups.survivors(alive), alive)
        return kept

    def _hold(self, culprits: Mapping[int, str]) -> tuple[Kept, ...]:
        """Keep groups whole from now on, by their numbers, each for its reason. Their dead units may live again."""
        if not culprits:
            return ()
        groups, widths = self.groups.without(culprits), self.goal.widths.without(culprits)
        lowest = cost_of(groups.cost, self.goal.kind, widths.lowest(groups))
        self.goal = replace(self.goal, limit=max(self.goal.limit, lowest), widths=widths)
        known = len(self.groups.kept)
        self._rebind(groups, self.ancestry.hold(culprits, self.groups.group_of_unit))
        return groups.kept[known:]

    def unwrap_(self) -> None:
        """Remove what the base pruner put into the model. Call when pruning is over."""
        if self.is_prepared:
            self.base.restore_(self.model)
            self.is_prepared = False

    def _find_units(self) -> tuple[Units, Units]:
        """Return the units scaled while decaying, and all entries zeroed at death."""
        whole = Units(self.groups, self.model)
        return self.base.decays(self.groups, self.model) or whole, whole

    def _rebind(self, groups: Groups, stays: Flags) -> None:
        """Go on with these groups. stays: (units before,) those that are units of them."""
        self.groups = groups
        self.units, whole = self._find_units()
        self.decay.rebind(self.units, stays, whole)
        if self.decay.rectifier:
            group_of_unit = torch.from_numpy(self.groups.group_of_unit).to(self.units.device)
            self.decay.rectifier.bind(group_of_unit, len(self.groups))
        self.base.bind(self.groups, self.model, np.flatnonzero(stays))

    def state_dict(self) -> dict[str, Any]:
        """Return all state but the weights."""
        return {
            "survivors": torch.from_numpy(self.ancestry.survivors),
            "held": dict(self.ancestry.held),
            **{name: getattr(self, name) for name in COUNTED},
            "is_prepared": self.is_prepared,
            "decay": self.decay.state_dict(),
            "base": self.base.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint: shrink the dense model to the saved structure. Load the weights afterwards."""
        alive = state["survivors"].numpy()
        if alive.shape != (self.groups.units,) or alive.dtype != bool:
            raise ValueError(f"survivors {alive.shape} of {self.groups.units} units")
        self._compact_(alive)
        self._hold({int(i): str(reason) for i, reason in state["held"].items()})
        for name, kind in COUNTED.items():
            setattr(self, name, kind(state[name]))
        self.decay.load_state_dict(state["decay"])
        self.base.load_state_dict(state["base"])
        if not state["is_prepared"]:
            self.unwrap_()


def _choose(pruning: Pruning, scores: Scores, *, limit: int, alive: Flags, eligible: Flags | None = None) -> Flags:
    """Choose (units,) victims for a limit, in the way that the base pruner's scores ask for."""
    base, goal = pruning.base, pruning.goal
    return choose_victims(
        pruning.groups,
        goal.widths,
        scores,
        base.weights(),
        kind=goal.kind,
        limit=limit,
        alive=alive,
        eligible=eligible,
        traded=base.scores_are_losses,
    )


def _choose_marked(pruning: Pruning) -> None:
    """Start the decay of units that the base has marked, as far as the target needs them."""
    present, base, decay = pruning._present, pruning.base, pruning.decay
    eligible = base.marked().cpu().numpy() & present & ~decay.released.cpu().numpy()
    if not eligible.any():
        return
    victims = _choose(pruning, base.scores(), limit=pruning.goal.limit, alive=present, eligible=eligible)
    if victims.any():
        decay.add(victims)
        pruning.chosen += int(victims.sum())


def _choose_again(pruning: Pruning) -> None:
    """Correct the victims of a planned round by what its gradients have shown, at the moment that is set for it."""
    if (scores := pruning.decay.reconsider()) is None:
        return
    present, alive = pruning._present, ~pruning.decay.dead.cpu().numpy()
    victims = _choose(pruning, scores, limit=pruning._limit_of_round(), alive=alive)
    pruning.decay.exchange(victims)
    pruning.chosen += int((victims & present).sum())


COUNTED = {
    "round": int,
    "skipped": int,
    "in_round": bool,
    "is_choosing": bool,
    "chosen": int,
    "released": int,
    "topped_up": int,
}


def foresee(pruning: Pruning) -> Flags:
    """Return (units,) of the dense model that would be left if all that the target needs were chosen now."""
    present, alive = pruning._present, pruning.ancestry.survivors.copy()
    chosen = _choose(pruning, pruning.base.scores(), limit=pruning.goal.limit, alive=present)
    alive[pruning.ancestry.units[~present | chosen]] = False
    return alive


def tell_removal(pruning: Pruning, removal: Removal, *, stage: str, step: int) -> Iterator[Event]:
    """Make the events of a removal: what is left of the model, and which layers had to stay whole."""
    cost, alive = pruning.groups.cost, pruning.all_alive
    yield UnitsRemoved(
        stage=stage,
        round=pruning.round,
        step=step,
        removed=removal.removed,
        released=removal.released,
        macs=cost.macs(alive),
        params=cost.parameters(alive),
        units=pruning.groups.units,
        difference=removal.difference,
    )
    for layer in removal.held:
        yield Note(f"{layer.layer} is kept whole from now on: {layer.reason}")

"""When the rounds of a run start, in steps over all stages that prune."""

from collections.abc import Sequence
from dataclasses import dataclass

from dpm_cli.errors import RecipeError
from dpm_cli.method.pruners import BasePruner
from dpm_cli.method.stages import Stage
from dpm_cli.recipe import Recipe


@dataclass(frozen=True)
class Rounds:
    """The first step of every planned round, and the step from which on nothing is condemned any more."""

    starts: tuple[int, ...]
    end: int


def plan(recipe: Recipe, stages: Sequence[Stage], base: BasePruner, *, steps_per_epoch: int) -> Rounds:
    """The rounds of a whole run. Raises RecipeError if they do not fit."""
    prune, decay = recipe.prune, recipe.decay
    rectify, steps = decay.rectify is not None, recipe.train.epochs * steps_per_epoch
    if prune.base == "gate-decorator":
        return plan_ticks(
            stages,
            steps_per_epoch=steps_per_epoch,
            decay_steps=decay.steps,
            may_miss=rectify or base.condemns,
        )
    if base.condemns_each_step:
        return plan_condemning(steps, decay_steps=decay.steps, start=prune.start, end=prune.end, warm_up=base.warm_up)
    return plan_rounds(
        steps,
        rounds=prune.rounds,
        decay_steps=decay.steps,
        start=prune.start,
        end=prune.end,
        rectify=rectify,
        warm_up=base.warm_up,
    )


def plan_rounds(
    steps: int, *, rounds: int, decay_steps: int, start: float, end: float, rectify: bool, warm_up: int = 0
) -> Rounds:
    """Rounds spread evenly over a stage of `steps`. start, end: fractions of it.

    Each takes `decay_steps` (one-step pruning takes none). With releases, one more round must fit after the last to top
    up. warm_up: steps that the base pruner must see first. A stage of no steps has one round, which cuts at once.
    Raises RecipeError if they do not fit.
    """
    if not steps:
        if warm_up:
            raise RecipeError("train.epochs is 0, but units are chosen by what training shows of them: raise it")
        return Rounds((0,), 0)
    taken = 0 if decay_steps == 1 else decay_steps
    first, last = max(round(start * steps), warm_up), round(end * steps)
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
    return Rounds(tuple(first + i * room for i in range(rounds)), last)


def plan_condemning(steps: int, *, decay_steps: int, start: float, end: float, warm_up: int) -> Rounds:
    """One long round in which the base pruner condemns units step by step, and room after it.

    What it condemned last must decay, and what it missed is then chosen by score and decays too.
    """
    first, last = max(round(start * steps), warm_up), round(end * steps)
    after = 1 if decay_steps == 1 else 2 * decay_steps  # even one-step pruning happens before a step
    if first >= last or last + after > steps:
        raise RecipeError(
            f"units are condemned from step {first} to {last} of {steps} (prune.start, prune.end), and {after} steps "
            "must follow for what is missing then: lower prune.end or decay.steps, or raise train.epochs"
        )
    return Rounds((first,), last)


def plan_ticks(stages: Sequence[Stage], *, steps_per_epoch: int, decay_steps: int, may_miss: bool) -> Rounds:
    """A round after every tick, in the stage that follows. Raises RecipeError if its decay does not fit there.

    may_miss: the planned rounds may miss the target, so one more must fit after the last.
    """
    taken = 0 if decay_steps == 1 else decay_steps
    starts, step, last = [], 0, 0
    for stage in (stage for stage in stages if stage.prunes):
        last, step = step, step + stage.training.epochs * steps_per_epoch
        if stage.name == "tick":
            starts.append(step)
        if (stage.name == "tick" and starts[-1:] != starts[:1]) or stage.name == "tock":
            room = step - last
            if starts and room < taken:
                raise RecipeError(
                    f"{decay_steps} decay steps do not fit into a {stage.name} of {room} steps: lower decay.steps, or "
                    "raise prune.gates.tick_epochs or train.epochs"
                )
    if not starts or starts[-1] == step:
        raise RecipeError("train.epochs is 0, but that is a tock, in which the last units decay: raise it")
    after = 2 if decay_steps == 1 else 2 * decay_steps  # even one-step pruning happens before a step
    if may_miss and starts[-1] + after > step:
        raise RecipeError(
            f"a tock of {step - starts[-1]} steps has no room for two times {decay_steps} decay steps, of the last "
            "tick's units and of what the target then still needs: lower decay.steps or raise train.epochs"
        )
    return Rounds(tuple(starts), step)

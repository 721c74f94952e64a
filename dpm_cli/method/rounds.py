"""Plan when the rounds of a run start and how long their decays take, in steps over all stages that prune.

Settings that are `auto` are fitted to the steps that there are. Those with a number are taken as they are, or refused.
"""

import math
from dataclasses import dataclass

from dpm_cli.errors import RecipeError
from dpm_cli.recipe.sections import Decay, Prune

MOST_ROUNDS = 5  # that `auto` plans
MOST_LOOKS = 20  # that it plans if every round is judged by the accuracy that it leaves: smaller steps come closer
WORTH_A_ROUND, WORTH_A_LOOK = 100, 30  # steps; `auto` plans fewer rounds rather than shorter ones
SHARE = 0.6  # of a round that `auto` lets units decay; the rest recovers before the next choice
LEAST_DECAY = 70  # steps that `auto` gives units to decay if they fit into half of the training, in a single round


@dataclass(frozen=True)
class Rounds:
    """Holds the first step of every planned round, and the first step at which no marked unit may be chosen."""

    starts: tuple[int, ...]
    end: int
    decay_steps: int  # that every unit takes to zero; 1 cuts at once


def plan_rounds(steps: int, prune: Prune, decay: Decay, *, warm_up: int = 0) -> Rounds:
    """Spread rounds evenly over a stage of `steps`, between its fractions `prune.start` and `prune.end`.

    Each round takes `decay.steps` (one-step pruning takes no steps). Without a `prune.end`, rounds and decays that are
    given as numbers may take until the middle, and so may the `LEAST_DECAY` steps of one that is `auto`. With releases,
    one more round must fit after the last to replace released units. warm_up: steps that the base pruner must see
    first. A stage without steps has one round, which cuts at once; `target.drop` alone has many, to look after each.
    Raises RecipeError if they do not fit.
    """
    if not steps:
        if warm_up:
            raise RecipeError("train.epochs is 0, but units are chosen by what training shows of them")
        target, looks = prune.target, MOST_LOOKS if prune.rounds == "auto" else prune.rounds
        is_open = not (target.drop is None or target.limits or target.latency)
        return Rounds((0,) * (looks if is_open else 1), 0, decay_steps=1)
    first, last = find_span(steps, prune, warm_up=warm_up)
    if prune.end is None:
        last = max(last, min(first + _count_asked(prune, decay), round(prune.latest * steps)))
    after = steps - last
    most, least = (MOST_LOOKS, WORTH_A_LOOK) if prune.target.drop is not None else (MOST_ROUNDS, WORTH_A_ROUND)
    least = least if decay.steps == "auto" else decay.steps
    rounds = max(1, min(most, (last - first) // least)) if prune.rounds == "auto" else prune.rounds
    room = (last - first) // rounds
    decay_steps = _fit_decay(steps, room, rounds, after, decay) if decay.steps == "auto" else decay.steps
    taken = count_taken(decay_steps)
    if room < max(taken, 1):
        raise RecipeError(
            f"{rounds} rounds of {decay_steps} decay steps do not fit between prune.start and prune.end "
            f"(steps {first} to {last} of {steps})"
        )
    if decay.may_fall_short(in_rounds=True) and taken > after:
        raise RecipeError(
            f"no room for {decay_steps} decay steps after prune.end (step {last} of {steps}) to replace released units"
        )
    return Rounds(tuple(first + i * room for i in range(rounds)), last, decay_steps)


def plan_each_step(steps: int, prune: Prune, decay: Decay, *, warm_up: int = 0) -> Rounds:
    """Plan one long round in which the base pruner marks units step by step, and leave room after it.

    The units marked last must still decay, and missing ones are then chosen by score and must decay too.
    Raises RecipeError if they cannot.
    """
    require_no_reselection(decay, "units are chosen step by step")
    first, last = find_span(steps, prune, warm_up=warm_up)
    decay_steps = max(1, min(longest_decay(steps), (steps - last) // 2)) if decay.steps == "auto" else decay.steps
    after = 1 if decay_steps == 1 else 2 * decay_steps  # one-step pruning also happens before a step
    if first >= last or last + after > steps:
        raise RecipeError(
            f"units are marked from step {first} to {last} of {steps} (prune.start, prune.end), and {after} steps "
            "must follow for what is missing then"
        )
    return Rounds((first,), last, decay_steps)


def require_no_reselection(decay: Decay, why: str) -> None:
    """Raise RecipeError if units are to be chosen again in the middle of a round, which needs rounds by the target."""
    if decay.rectify and decay.rectify.criterion == "reselect":
        raise RecipeError(f"decay.rectify.criterion is reselect, but {why}: set decay.rectify.criterion: significance")


def find_span(steps: int, prune: Prune, *, warm_up: int) -> tuple[int, int]:
    """Return the first step of the first round, and the step at which the last planned one is over.

    At least one step lies between them if the stage has one to spare.
    """
    first = max(round(prune.start * steps), warm_up)
    return first, max(round(prune.last * steps), min(first + 1, steps))


def count_taken(decay_steps: int) -> int:
    """Count the steps that the decay of one round takes; one-step pruning takes 0."""
    return 0 if decay_steps == 1 else decay_steps


def _count_asked(prune: Prune, decay: Decay) -> int:
    """Count the steps that the rounds take as far as they are given; decays that are `auto` ask for the least."""
    rounds = 1 if prune.rounds == "auto" else prune.rounds
    return max(rounds, LEAST_DECAY) if decay.steps == "auto" else rounds * decay.steps


def longest_decay(steps: int) -> int:
    """Return the most that `decay.steps: auto` gives in a training of `steps`: 200, and more in long ones."""
    return max(200, int(2 * math.sqrt(steps)))


def _fit_decay(steps: int, room: int, rounds: int, after: int, decay: Decay) -> int:
    """Choose the steps of a decay for rounds of `room` of all `steps`, with `after` steps behind the last one.

    A prune.end that leaves nothing behind the last round is refused later, not answered by cutting at once.
    """
    share = int(SHARE * room)
    wanted = share if rounds > 1 else max(share, min(LEAST_DECAY, room))
    fitting = min(longest_decay(steps), max(1, wanted))
    return min(fitting, max(after, 2)) if decay.may_fall_short(in_rounds=True) else fitting

"""Plan when the rounds of a run start, in steps over all stages that prune."""

from dataclasses import dataclass

from dpm_cli.errors import RecipeError
from dpm_cli.recipe.sections import Decay, Prune


@dataclass(frozen=True)
class Rounds:
    """Holds the first step of every planned round, and the first step at which no marked unit may be chosen."""

    starts: tuple[int, ...]
    end: int


def plan_rounds(steps: int, prune: Prune, decay: Decay, *, warm_up: int = 0) -> Rounds:
    """Spread rounds evenly over a stage of `steps`, between its fractions `prune.start` and `prune.end`.

    Each round takes `decay.steps` (one-step pruning takes no steps). With releases, one more round must fit after the
    last to replace released units. warm_up: steps that the base pruner must see first. A stage without steps has one
    round, which cuts at once. Raises RecipeError if the rounds do not fit.
    """
    if not steps:
        if warm_up:
            raise RecipeError("train.epochs is 0, but units are chosen by what training shows of them: raise it")
        return Rounds((0,), 0)
    taken = count_taken(decay)
    first, last = max(round(prune.start * steps), warm_up), round(prune.end * steps)
    room = (last - first) // prune.rounds
    if room < max(taken, 1):
        raise RecipeError(
            f"{prune.rounds} rounds of {decay.steps} decay steps do not fit between prune.start and prune.end "
            f"(steps {first} to {last} of {steps}): lower prune.rounds or decay.steps, or raise train.epochs or "
            "prune.end"
        )
    if decay.rectify and last + taken > steps:
        raise RecipeError(
            f"no room for {decay.steps} decay steps after prune.end (step {last} of {steps}) to replace released "
            "units: lower prune.end or decay.steps, raise train.epochs, or set decay.rectify: false"
        )
    return Rounds(tuple(first + i * room for i in range(prune.rounds)), last)


def plan_each_step(steps: int, prune: Prune, decay: Decay, *, warm_up: int = 0) -> Rounds:
    """Plan one long round in which the base pruner marks units step by step, and leave room after it.

    The units marked last must still decay, and missing ones are then chosen by score and must decay too.
    """
    first, last = max(round(prune.start * steps), warm_up), round(prune.end * steps)
    after = 1 if decay.steps == 1 else 2 * decay.steps  # one-step pruning also happens before a step
    if first >= last or last + after > steps:
        raise RecipeError(
            f"units are marked from step {first} to {last} of {steps} (prune.start, prune.end), and {after} steps "
            "must follow for what is missing then: lower prune.end or decay.steps, or raise train.epochs"
        )
    return Rounds((first,), last)


def count_taken(decay: Decay) -> int:
    """Count the steps that the decay of one round takes; one-step pruning takes 0."""
    return 0 if decay.steps == 1 else decay.steps

"""Find what can be removed from a model before anything is trained."""

import copy
from dataclasses import dataclass
from functools import partial

from torch import nn

from dpm_cli.graph import Groups, find_groups
from dpm_cli.graph.folding import Shifts, find_shifts, give_biases_
from dpm_cli.graph.program import Example
from dpm_cli.method.budget import WidthLimits, choose_round_to, find_width_limits, resolve_limit
from dpm_cli.method.pruners import BasePruner
from dpm_cli.method.pruning import Goal
from dpm_cli.recipe.sections import Prune, Target


@dataclass(frozen=True)
class Survey:
    """Holds the groups that the base pruner can judge, and how far each may shrink."""

    module: nn.Module  # as given, or with added biases that will take the means of removed units
    groups: Groups
    shifts: Shifts  # where these means can go, if they are folded
    round_to: int
    widths: WidthLimits

    def goal(self, target: Target) -> Goal:
        """Turn the target into a cost limit. Raises TargetError with the achievable range."""
        limit = resolve_limit(self.groups, self.widths, kind=target.kind, amount=target.amount)
        return Goal(target.kind, limit, self.widths)


def survey(module: nn.Module, example: Example, prune: Prune, base: BasePruner, *, folds_means: bool = False) -> Survey:
    """Find the groups of a dense module in eval mode on the CPU. Raises what `find_groups` raises.

    example: inputs with a batch of 2 or more. folds_means: layers will need a place for the means of removed units.
    """
    find = partial(find_groups, keep=prune.keep, prune_embedding=prune.embedding == "prune")
    groups, shifts = find(module, example), Shifts()
    if folds_means:
        shifts, module = find_shifts(module, example), copy.deepcopy(module)
        if give_biases_(module, groups, shifts):
            groups = find(module, example)
    groups = base.choosable(groups, module)
    target, min_keep = prune.target, prune.min_keep
    round_to = choose_round_to(groups, prune.round_to, min_keep=min_keep, kind=target.kind, amount=target.amount)
    return Survey(module, groups, shifts, round_to, find_width_limits(groups, round_to=round_to, min_keep=min_keep))

"""Find what can be removed from a model before anything is trained."""

import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from dpm_cli.errors import TargetError
from dpm_cli.graph import Groups, find_groups
from dpm_cli.graph.folding import Shifts, find_shifts, give_biases_
from dpm_cli.graph.program import Example
from dpm_cli.method.budget import Kind, Several, WidthLimits, choose_round_to, cost_of, find_width_limits, resolve_limit
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
        """Turn the target into a cost limit. Raises TargetError with the achievable range.

        A target that limits only the loss of accuracy aims at the fewest MACs; the run stops before.
        """
        asked: dict[Kind, tuple[float, int]] = {
            kind: (amount, resolve_limit(self.groups, self.widths, kind=kind, amount=amount))
            for kind, amount in target.limits.items()
        }
        if not asked:
            lowest = cost_of(self.groups.cost, "macs", self.widths.lowest(self.groups))
            if lowest == cost_of(self.groups.cost, "macs", np.ones(self.groups.units, bool)):
                raise TargetError("target drop cannot be aimed at: no unit may be removed with this min_keep and keep")
            return Goal("macs", lowest, self.widths)
        if len(asked) == 1:
            ((kind, (_, limit)),) = asked.items()
            return Goal(kind, limit, self.widths, asked)
        limits = tuple((kind, limit) for kind, (_, limit) in asked.items())
        return Goal(Several(limits), Several.WHOLE, self.widths, asked)


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
    round_to = choose_round_to(groups, prune.round_to, min_keep=min_keep, amounts=target.limits)
    return Survey(module, groups, shifts, round_to, find_width_limits(groups, round_to=round_to, min_keep=min_keep))

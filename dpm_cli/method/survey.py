"""Find what can be removed from a model before anything is trained."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from dpm_cli.errors import TargetError, UsageError
from dpm_cli.graph import Groups, find_groups
from dpm_cli.graph.folding import Shifts, find_shifts, give_biases_
from dpm_cli.graph.labels import Flags
from dpm_cli.graph.program import Example
from dpm_cli.graph.rehearsal import rehearse_survivors
from dpm_cli.method.budget import (
    AUTO_STEPS,
    Kind,
    Measure,
    Several,
    WidthLimits,
    choose_round_to,
    choose_victims,
    cost_of,
    find_limit,
    find_width_limits,
    resolve_limit,
)
from dpm_cli.method.pruners import BasePruner
from dpm_cli.method.pruning import Goal
from dpm_cli.recipe.sections import Prune, Target

TimeWidths = Callable[[nn.Module, Groups, WidthLimits], Measure]


@dataclass(frozen=True)
class Survey:
    """Holds the groups that the base pruner can judge, and how far each may shrink."""

    module: nn.Module  # as given, or with added biases that will take the means of removed units
    groups: Groups
    shifts: Shifts  # where these means can go, if they are folded
    round_to: int
    widths: WidthLimits
    latency: Measure | None = None  # predicts milliseconds, if the target limits them

    def goal(self, target: Target) -> Goal:
        """Turn the target into a cost limit. Raises TargetError with the achievable range.

        A target that limits only the loss of accuracy aims at the fewest MACs; the run stops before.
        """
        asked: dict[Kind, tuple[float, int]] = {
            kind: (amount, resolve_limit(self.groups, self.widths, kind=kind, amount=amount))
            for kind, amount in target.limits.items()
        }
        if target.latency is not None:
            if self.latency is None:
                raise UsageError("target latency is measured on exports, which only dpm prune writes: give macs")
            asked[self.latency] = (
                target.latency,
                resolve_limit(self.groups, self.widths, kind=self.latency, amount=target.latency),
            )
        if not asked:
            lowest = cost_of(self.groups.cost, "macs", self.widths.lowest(self.groups))
            if lowest == cost_of(self.groups.cost, "macs", np.ones(self.groups.units, bool)):
                raise TargetError("target drop cannot be aimed at: no unit may be removed with this min_keep and keep")
            return Goal("macs", lowest, self.widths, is_open=True)
        if len(asked) == 1:
            ((kind, (_, limit)),) = asked.items()
            return Goal(kind, limit, self.widths, asked)
        limits = tuple((kind, limit) for kind, (_, limit) in asked.items())
        return Goal(Several(limits), Several.WHOLE, self.widths, asked)


def survey(
    module: nn.Module,
    example: Example,
    prune: Prune,
    base: BasePruner,
    *,
    folds_means: bool = False,
    time_widths: TimeWidths | None = None,
) -> Survey:
    """Find the groups of a dense module in eval mode on the CPU. Raises what `find_groups` raises.

    example: inputs with a batch of 2 or more. folds_means: layers will need a place for the means of removed units.
    time_widths: fills a table of latencies, for a target that limits them.
    """
    find = partial(find_groups, keep=prune.keep, prune_embedding=prune.embedding == "prune")
    groups, shifts = find(module, example), Shifts()
    if folds_means:
        shifts, module = find_shifts(module, example), copy.deepcopy(module)
        if give_biases_(module, groups, shifts):
            groups = find(module, example)
    found = _limit_widths(module, base.choosable(groups, module), shifts, prune)
    for plan in (_plan_some, _plan_fewest):
        groups = rehearse_survivors(module, example, found.groups, plan(found, prune.target))
        if len(groups) < len(found.groups):
            found = _limit_widths(module, groups, shifts, prune)
    if time_widths and prune.target.latency is not None:
        return _time_widths(found, prune, prune.target.latency, time_widths)
    return found


def _limit_widths(module: nn.Module, groups: Groups, shifts: Shifts, prune: Prune) -> Survey:
    min_keep = prune.min_keep
    round_to = choose_round_to(groups, prune.round_to, min_keep=min_keep, amounts=prune.target.limits)
    return Survey(module, groups, shifts, round_to, find_width_limits(groups, round_to=round_to, min_keep=min_keep))


def _time_widths(found: Survey, prune: Prune, amount: float, time_widths: TimeWidths) -> Survey:
    """Add what predicts latency. If `round_to` is auto: at the coarsest step that can meet the target, else the best.

    Narrower layers are not always faster, so each step has to be measured.
    """
    steps = [step for step in AUTO_STEPS if step <= found.round_to] if prune.round_to == "auto" else [found.round_to]
    groups, tried = found.groups, list[tuple[int, Survey]]()
    for step in steps:
        widths = find_width_limits(groups, round_to=step, min_keep=prune.min_keep)
        latency = time_widths(found.module, groups, widths)
        dense = cost_of(groups.cost, latency, np.ones(groups.units, bool))
        lowest = cost_of(groups.cost, latency, widths.lowest(groups))
        tried.append((lowest, replace(found, round_to=step, widths=widths, latency=latency)))
        if lowest <= find_limit(dense, amount):
            return tried[-1][1]
    return min(tried, key=lambda each: each[0])[1]


def _plan_fewest(found: Survey, target: Target) -> Flags:
    """Return (units,) as few survivors as allowed."""
    return found.widths.lowest(found.groups)


def _plan_some(found: Survey, target: Target) -> Flags:
    """Return (units,) survivors that meet the target, chosen at random; training will choose others."""
    try:
        goal = found.goal(target)
    except (TargetError, UsageError):  # whoever asks for the goal is told
        return _plan_fewest(found, target)
    scores = np.random.default_rng(0).random(found.groups.units)
    return ~choose_victims(found.groups, found.widths, scores, kind=goal.kind, limit=goal.limit)

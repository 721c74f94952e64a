"""What can be removed from a model under a recipe, before anything is trained."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dpm_cli.graph import Groups, find_groups
from dpm_cli.graph.folding import Shifts, find_shifts, give_biases_
from dpm_cli.method.budget import Floors, choose_round_to, find_floors
from dpm_cli.method.pruners import make_base
from dpm_cli.recipe import Recipe


@dataclass(frozen=True)
class Survey:
    """The groups that the base pruner can judge, and how far each may shrink."""

    module: nn.Module  # as it was given, or with biases that will take the means of removed units
    groups: Groups
    shifts: Shifts  # where these means can go, if they are to be folded
    round_to: int
    floors: Floors


def survey(module: nn.Module, recipe: Recipe) -> Survey:
    """module: dense, in eval mode on the CPU. Raises what `find_groups` raises."""
    prune, example, shifts = recipe.prune, torch.zeros(2, *recipe.model.input), Shifts()
    find = partial(find_groups, keep=prune.keep, prune_embedding=prune.embedding == "prune")
    groups = find(module, example)
    if recipe.folds_means:
        shifts, module = find_shifts(module, example), copy.deepcopy(module)
        if give_biases_(module, groups, shifts):
            groups = find(module, example)
    groups = make_base(recipe).choosable(groups, module)
    target = prune.target
    if recipe.cuts_weights:
        return Survey(module, groups, shifts, 1, find_floors(groups, round_to=1, min_keep=prune.min_keep))
    round_to = choose_round_to(groups, prune.round_to, min_keep=prune.min_keep, kind=target.kind, amount=target.amount)
    return Survey(module, groups, shifts, round_to, find_floors(groups, round_to=round_to, min_keep=prune.min_keep))

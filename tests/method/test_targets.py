"""Targets besides one number of MACs: sizes, several at once, points of accuracy."""

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from dpm_cli.errors import RecipeError, TargetError
from dpm_cli.method.budget import Several, choose_victims, cost_of
from dpm_cli.method.pruners import make_base
from dpm_cli.method.survey import Survey, survey
from dpm_cli.recipe import dump_recipe, load_recipe, parse_recipe
from dpm_cli.recipe.sections import Prune, Training


def look_at(target: dict[str, object], **settings: object) -> tuple[Survey, Prune]:
    """Two convolutions: the first is dear in MACs, the second in parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Conv2d(16, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 4),
    ).eval()
    prune = Prune.model_validate({"target": target, "round_to": 1} | settings)
    base = make_base(prune, Training(), seed=0)
    found = survey(net, torch.zeros(2, 3, 32, 32), prune, base)
    base.bind(found.groups, found.module)
    return found, prune


def left(found: Survey, prune: Prune) -> dict[str, float]:
    """The fractions of each cost that are left."""
    goal, groups = found.goal(prune.target), found.groups
    scores = np.random.default_rng(0).random(groups.units)
    alive = ~choose_victims(groups, found.widths, scores, kind=goal.kind, limit=goal.limit)
    everything = np.ones(groups.units, bool)
    return {
        kind: cost_of(groups.cost, kind, alive) / cost_of(groups.cost, kind, everything)
        for kind in ("macs", "params", "channels", "size")
    }


@pytest.mark.parametrize(
    "target",
    [{"macs": 0.3, "params": 0.9}, {"macs": 0.9, "params": 0.3}, {"macs": 0.5, "params": 0.5, "channels": 0.4}],
)
def test_all_of_several_targets_hold_and_one_is_tight(target: dict[str, float]) -> None:
    reached = left(*look_at(target))
    assert all(reached[kind] <= amount for kind, amount in target.items())
    assert any(reached[kind] > 0.8 * amount for kind, amount in target.items())


def test_one_target_of_several_kinds_is_the_same_as_alone() -> None:
    assert left(*look_at({"macs": 0.5, "params": 0.999})) == left(*look_at({"macs": 0.5}))


def test_size_is_four_bytes_a_parameter() -> None:
    found, prune = look_at({"size": "20KB"})
    goal, everything = found.goal(prune.target), np.ones(found.groups.units, bool)
    assert (goal.kind, goal.limit) == ("size", 20_000)
    weights = sum(parameter.numel() for parameter in found.module.parameters())
    assert cost_of(found.groups.cost, "size", everything) == 4 * weights


def test_each_of_several_targets_is_refused_by_its_own_range() -> None:
    found, prune = look_at({"macs": 0.5, "size": "300B"})
    with pytest.raises(TargetError, match=r"target size 300 bytes cannot be met: between [\d,]+ bytes"):
        found.goal(prune.target)


def test_share_of_the_tightest_limit_is_counted_exactly() -> None:
    found, _ = look_at({"macs": 0.5})
    alive = np.arange(found.groups.units) % 2 == 0
    macs, params = (cost_of(found.groups.cost, kind, alive) for kind in ("macs", "params"))
    assert cost_of(found.groups.cost, Several((("macs", macs), ("params", 2 * params))), alive) == Several.WHOLE
    assert cost_of(found.groups.cost, Several((("macs", macs - 1),)), alive) > Several.WHOLE


def test_drop_aims_at_the_smallest_model() -> None:
    found, prune = look_at({"drop": 1.0})
    goal = found.goal(prune.target)
    assert (goal.kind, goal.asked) == ("macs", {})
    assert goal.limit == cost_of(found.groups.cost, "macs", found.widths.lowest(found.groups))


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"target": {}}, "name macs, params, channels, size, latency or drop"),
        ({"target": {"size": "5 apples"}}, "'5 apples'; must be a fraction to keep such as 0.47, or a size in B, KB"),
        ({"target": {"drop": 0}}, "drop"),
        ({"target": {"macs": 0.5, "sparsity": 0.5}, "base": "on-the-fly"}, "excludes all other targets"),
        ({"target": {"drop": 1.0}, "max_drop": 2.0}, "leave one of them out"),
        ({"target": {"drop": 1.0}, "base": "otov2"}, "one long round"),
    ],
)
def test_unclear_targets_are_refused(prune: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"model": {"arch": "digits"}, "data": {"name": "digits"}, "prune": prune})


def test_drop_needs_validation_images() -> None:
    with pytest.raises(RecipeError, match=r"prune.target.drop is judged on validation images"):
        load_recipe("digits", ["prune.target.drop=1.0", "data.validation=0"])


@pytest.mark.parametrize("target", ["{macs: 0.5, size: 5MB}", "{drop: 1.5}", "{macs: 0.5, drop: 1}"])
def test_targets_survive_a_dump(target: str) -> None:
    recipe = load_recipe("digits", [f"prune.target={target}"])
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))).prune == recipe.prune

"""Schedules that are left to `auto` fit any training, and numbers that do not fit are answered by some that do."""

import re
from typing import Any

import pytest

from dpm_cli.errors import RecipeError
from dpm_cli.method.schedule import plan_schedule
from dpm_cli.recipe import load_recipe, parse_recipe, shipped_recipes
from dpm_cli.recipe.schema import Recipe

BASES = ("depgraph", "otov2", "gate-decorator")


def recipe_of(*overrides: str) -> Recipe:
    smallest: dict[str, Any] = {"model": {"arch": "digits"}, "data": {"name": "digits"}}
    return parse_recipe(smallest | {"prune": {"target": {"macs": 0.5}}}, overrides)


def plan(recipe: Recipe, images: int) -> tuple[int, int, int]:
    """Rounds, decay steps, and the end of the planned rounds."""
    steps_per_epoch = max(1, images // recipe.data.batch)
    rounds = plan_schedule(recipe.prune, recipe.train, recipe.decay, steps_per_epoch=steps_per_epoch)
    return len(rounds.starts), rounds.decay_steps, rounds.end


def ways_out(error: pytest.ExceptionInfo[RecipeError]) -> list[list[str]]:
    """The settings that a refusal names: a list of ways out, each a list of overrides."""
    _, _, named = str(error.value).partition(": set ")
    return [
        [f"{key}={value}" for key, value in re.findall(r"([a-z_.]+): ([\w.]+)", way)] for way in named.split(", or ")
    ]


def test_long_trainings_get_five_rounds_in_their_first_fifth() -> None:
    assert plan(recipe_of(), 45_000) == (5, 168, 1404)  # of 7020 steps


@pytest.mark.parametrize(
    ("overrides", "end"),
    [
        (["prune.start=0.5"], 4212),  # a fifth of what follows
        (["prune.base=otov2"], 3510),
        (['prune.target={"drop": 1}'], 3510),
        (["prune.end=0.4"], 2808),
    ],
    ids=str,
)
def test_the_end_depends_on_what_is_pruned_for(overrides: list[str], end: int) -> None:
    assert plan(recipe_of(*overrides), 45_000)[2] == end


def test_short_trainings_get_fewer_rounds_before_short_decays() -> None:
    assert plan(recipe_of("train.epochs=20"), 2_000) == (1, 70, 70)  # 15 steps an epoch: more than a fifth of 300
    assert plan(recipe_of("train.epochs=5"), 2_000) == (1, 38, 38)  # half of 75
    assert plan(recipe_of("train.epochs=1"), 300) == (1, 1, 1)


def test_what_is_given_as_a_number_stays_and_the_rest_is_fitted_to_it() -> None:
    assert plan(recipe_of("decay.steps=100"), 10_000) == (3, 100, 312)
    assert plan(recipe_of("decay.steps=300"), 10_000) == (1, 300, 312)
    assert plan(recipe_of("decay.steps=20", "train.epochs=10"), 2_000) == (1, 20, 30)  # a fifth of 150
    assert plan(recipe_of("prune.rounds=10"), 10_000) == (10, 18, 312)


def test_numbers_that_need_more_than_a_fifth_may_take_half() -> None:
    assert plan(recipe_of("prune.rounds=5", "decay.steps=100"), 10_000) == (5, 100, 500)
    assert plan(recipe_of("decay.steps=700"), 10_000) == (1, 700, 700)


def test_ticks_are_as_many_as_leave_few_gates_but_not_endless() -> None:
    gates = ["prune.base=gate-decorator", "train.epochs=2"]
    assert plan(recipe_of(*gates), 1_000)[0] == 5
    assert plan(recipe_of(*gates, "prune.gates.fraction=0.1"), 1_000)[0] == 22  # 0.9^22 < 0.1
    assert plan(recipe_of(*gates, "prune.gates.fraction=1e-9"), 1_000)[0] == 10_000
    with pytest.raises(RecipeError, match=r"prune\.rounds is 10001; must be a whole number from 1 to 10000, or auto"):
        recipe_of("prune.rounds=10001")


def test_a_longer_training_has_longer_decays() -> None:
    assert plan(recipe_of("train.epochs=200"), 45_000)[:2] == (5, 529)  # 2 √70 200


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name != "on-the-fly"])  # it has no rounds
@pytest.mark.parametrize("change", ["data.limit=2000", "train.epochs=2"])
def test_shipped_recipes_fit_short_trainings(name: str, change: str) -> None:
    images = {"digits": 1294, "folder": 2000}.get(name, 45_000)
    recipe = load_recipe(name, [change])
    rounds, _, _ = plan(recipe, min(images, int((recipe.data.limit or images) * 0.9)))
    assert rounds >= 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["decay.steps=200", "train.epochs=1"],
        ["prune.rounds=5", "decay.steps=200", "train.epochs=2"],
        ["prune.end=1.0", "decay.rectify.criterion=significance"],
        ["prune.base=otov2", "train.epochs=0"],
        ["prune.base=otov2", "prune.end=1.0"],
        ["prune.base=otov2", "decay.steps=500", "train.epochs=1"],
        ["prune.base=gate-decorator", "decay.steps=50", "train.epochs=1"],
        ["prune.base=gate-decorator", "decay.steps=20", "train.epochs=5"],
        ["prune.base=gate-decorator", "train.epochs=0"],
    ],
    ids=" ".join,
)
def test_every_way_out_that_a_refusal_names_fits(overrides: list[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        plan(recipe_of(*overrides), 2_000)
    ways = ways_out(refused)
    assert ways[0], str(refused.value)
    for way in ways:
        plan(recipe_of(*overrides, *way), 2_000)


def test_a_way_out_is_no_larger_a_change_than_needed() -> None:
    with pytest.raises(RecipeError, match=r"set decay\.steps: 10, or train\.epochs: 19, or") as refused:
        plan(recipe_of("prune.rounds=5", "decay.steps=100", "train.epochs=2"), 7_000)
    assert ways_out(refused)[1] == ["train.epochs=19"]

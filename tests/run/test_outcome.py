"""What a run says of itself."""

from dpm_cli.data import load_data
from dpm_cli.method.pruners import make_base
from dpm_cli.recipe import parse_recipe
from dpm_cli.run.outcome import name_method, remark_on_chance, remark_on_cost, remark_on_teacher


def method(*overrides: str, decay_steps: int = 9) -> str:
    settings = {"model": {"arch": "digits"}, "data": {"name": "digits"}, "prune": {"target": {"macs": 0.5}}}
    recipe = parse_recipe(settings, overrides)
    base = make_base(recipe.prune, recipe.train, seed=0)
    return name_method(base, recipe.decay, decay_steps)


def test_the_method_claims_dpm_only_where_units_decay() -> None:
    assert method() == "depgraph + DPM"
    assert method(decay_steps=1) == "depgraph"
    assert method("prune.importance=fisher") == "depgraph (fisher) + DPM"
    assert method("prune.base=gate-decorator", decay_steps=1) == "gate-decorator"
    hesso = ("prune.base=otov2", "prune.otov2.variant=hesso", "decay.envelope=multiplicative")
    assert method(*hesso, "decay.rectify=true") == "otov2 (hesso) + DPM"  # units can be released
    assert method(*hesso) == "otov2 (hesso)"


def test_a_cost_is_remarked_if_it_is_another_counters_or_not_what_was_predicted() -> None:
    settings = {"model": {"arch": "digits"}, "data": {"name": "digits"}, "prune": {"target": {"macs": 0.5}}}
    recipe = parse_recipe(settings)
    assert list(remark_on_cost(recipe, (10, 5), (10, 5))) == []
    assert list(remark_on_cost(recipe, (10, 5), (11, 5))) == [
        "predicted cost (10, 5) differs from the measured one (11, 5)"
    ]
    (remark,) = remark_on_cost(parse_recipe(settings, ["counter=thop"]), (10, 5), (11, 5))
    assert remark.startswith("MACs are counted by thop")


def test_a_model_that_only_guesses_is_told() -> None:
    settings = {"model": {"arch": "digits"}, "data": {"name": "digits"}, "prune": {"target": {"macs": 0.5}}}
    recipe = parse_recipe(settings, ["model.classes=10", "train.lr=10"])
    splits = load_data(recipe.data, shape=(1, 8, 8), classes=10, seed=0)
    (remark,) = remark_on_chance(98.0, 9.9, splits, recipe)
    assert "9.90 % in 10 classes, 98.00 % before; lower train.lr (10)" in remark
    assert list(remark_on_chance(98.0, 60.0, splits, recipe)) == []
    assert list(remark_on_chance(10.0, 9.9, splits, recipe)) == []  # it guessed before
    assert list(remark_on_chance(None, None, splits, recipe)) == []


def test_a_teacher_that_its_pupil_beats_clearly_is_told() -> None:
    settings = {"model": {"arch": "digits"}, "data": {"name": "digits"}, "prune": {"target": {"macs": 0.5}}}
    recipe = parse_recipe(settings)
    splits = load_data(recipe.data, shape=(1, 8, 8), classes=10, seed=0)
    (remark,) = remark_on_teacher(82.7, 92.4, splits)
    assert "its teacher (92.40 % to 82.70 %)" in remark
    assert list(remark_on_teacher(82.7, 83.5, splits)) == []  # of so few images that is chance
    assert list(remark_on_teacher(None, None, splits)) == []

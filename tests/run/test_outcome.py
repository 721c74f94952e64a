"""What a run says of itself."""

from dpm_cli.method.pruners import make_base
from dpm_cli.recipe import parse_recipe
from dpm_cli.run.outcome import name_method, remark_on_cost


def method(*overrides: str, decay_steps: int = 9) -> str:
    settings = {"model": {"arch": "digits"}, "data": {"name": "digits"}, "prune": {"target": {"macs": 0.5}}}
    recipe = parse_recipe(settings, overrides)
    base = make_base(recipe.prune, recipe.train, seed=0)
    return name_method(base, recipe.decay, decay_steps)


def test_the_method_claims_dpm_only_where_units_decay() -> None:
    assert method() == "depgraph + DPM"
    assert method(decay_steps=1) == "depgraph"
    assert method("prune.importance=mixed") == "depgraph (mixed) + DPM"
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

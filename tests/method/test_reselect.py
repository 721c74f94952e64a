import numpy as np
import pytest
import torch
from torch import nn

import dpm_cli
from dpm_cli.errors import RecipeError
from dpm_cli.graph import Units, find_groups
from dpm_cli.method.decay import Decay
from dpm_cli.method.pruners import make_base
from dpm_cli.method.reselect import Reselection, rank_in_one
from dpm_cli.recipe import parse_recipe, sections
from dpm_cli.recipe.reader import plain_values
from dpm_cli.recipe.sections import Prune, Rectify, Training

AGAIN = {"criterion": "reselect", "start": 0.5}
torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3)).eval()
GROUPS = find_groups(NET, torch.zeros(2, 1, 8, 8))


def reselection(**settings: object) -> Reselection:
    return Reselection(GROUPS.units, torch.device("cpu"), Rectify.model_validate(AGAIN | settings))


def lengths(decay: Decay) -> list[float]:
    return [round(norm, 5) for norm in decay.units.norm().tolist()]


def test_ranks_lie_between_zero_and_one_and_keep_the_order_of_equals() -> None:
    assert rank_in_one(np.array([5.0, -1.0, 7.0, -1.0])).tolist() == pytest.approx([2 / 3, 0, 1, 1 / 3])
    assert rank_in_one(np.array([3.0])).tolist() == [0]


def test_evidence_is_of_units_at_full_length() -> None:
    """A unit that has lost three quarters of its length counts four times what its gradient says now."""
    model = torch.nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3)).eval()
    units, watch = Units(GROUPS, model), reselection()
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.full_like(parameter, -0.5)
    norms = units.norm()
    watch.observe(units, norms)
    decaying = torch.tensor([True, False, False, True])
    released = watch.judge(units, norms, decaying, torch.ones(4), norms * torch.tensor([4.0, 4.0, 1.0, 1.0]), 10)
    assert not released.any()
    assert watch.evidence.tolist() == pytest.approx([20.0, 5.0, 5.0, 5.0])  # nine weights and a bias, each 0.5
    watch.start(np.array([1.0, 0.0, 3.0, 2.0]))
    assert watch.evidence.tolist() == [0.0] * 4
    watch.observe(units, norms)
    watch.judge(units, norms, decaying, torch.ones(4), norms * torch.tensor([4.0, 1.0, 1.0, 1.0]), 10)
    assert watch.scores().tolist() == pytest.approx([1 / 3 + 1, 0 + 0, 1 + 1 / 3, 2 / 3 + 2 / 3])


def test_who_comes_later_is_zero_with_the_others_and_who_is_released_stays() -> None:
    decay = Decay(Units(GROUPS, NET), steps=4, rectifier=reselection())
    decay.start(np.array([True, True, False, False]), scores=np.arange(4.0))
    whole = lengths(decay)
    assert decay.reconsider() is None
    for _ in range(2):
        assert decay.reconsider() is None
        decay.observe()
        decay.advance_()
    assert decay.reconsider() is not None
    decay.exchange(np.array([True, False, True, False]))
    assert decay.released.tolist() == [False, True, False, False]
    decay.advance_()
    assert lengths(decay) == pytest.approx([whole[0] / 4, whole[1] / 2, whole[2] / 2, whole[3]], abs=1e-4)
    assert decay.reconsider() is None
    decay.advance_()
    assert decay.dead.tolist() == [True, False, True, False]
    assert decay.remaining == 0
    assert not decay.decaying.any()


def test_rounds_that_must_not_release_do_not_choose_again() -> None:
    decay = Decay(Units(GROUPS, NET), steps=4, rectifier=reselection(start=0.0))
    decay.start(np.array([True, False, False, False]), rectify=False, scores=np.arange(4.0))
    decay.advance_()
    assert decay.reconsider() is None
    decay.start(np.array([False, True, False, False]), scores=np.arange(4.0))
    decay.observe()
    decay.advance_()
    assert decay.reconsider() is not None


def test_it_chooses_when_four_tenths_are_over_unless_told_otherwise() -> None:
    assert reselection(start=None).is_due(4, 10)
    assert not reselection(start=None).is_due(3, 10)
    assert reselection(start=0.6).is_due(6, 10)
    assert reselection(start=0.61).is_due(7, 10)


@pytest.mark.parametrize(("start", "steps"), [(0.0, 4), (0.9, 4), (0.6, 2), (1.0, 4), (0.5, 4), (1.0, 2)])
def test_it_chooses_once_in_every_decay(start: float, steps: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))
    decay = Decay(Units(GROUPS, model), steps=steps, rectifier=reselection(start=start))
    decay.start(np.array([True, False, False, False]), scores=np.arange(4.0))
    times = 0
    while decay.remaining:
        decay.observe()
        decay.advance_()
        if decay.reconsider() is not None:
            times += 1
            decay.exchange(np.array([False, True, False, False]))
    assert times == 1
    assert decay.dead.tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("settings", "in_rounds", "criterion", "start", "rate"),
    [
        ("true", True, "reselect", 0.4, 2.0), ("true", False, "significance", 0.3, 2.0),
        ("{rate: 3.0}", True, "significance", 0.3, 3.0), ("{criterion: cosine}", True, "cosine", 0.3, 0.2),
        ("{start: 0.2}", True, "reselect", 0.2, 2.0), ("{criterion: reselect}", False, "reselect", 0.4, 2.0),
    ],
)  # fmt: skip
def test_auto_chooses_again_where_units_are_chosen_in_rounds(
    settings: str, in_rounds: bool, criterion: str, start: float, rate: float
) -> None:
    recipe = dpm_cli.load_recipe("digits", [f"decay.rectify={settings}"])
    again = parse_recipe(plain_values(recipe))
    for decay in (recipe.decay, again.decay):
        assert decay.rectify
        rule = decay.rectify.resolve(in_rounds=in_rounds)
        assert (rule.criterion, rule.start, rule.rate) == (criterion, start, rate)
        assert decay.may_fall_short(in_rounds=in_rounds) == (criterion != "reselect")


@pytest.mark.parametrize("base", ["otov2", "gate-decorator"])
def test_a_base_that_does_not_choose_by_rounds_is_refused(base: str) -> None:
    prune = Prune.model_validate({"base": base, "gates": {"fraction": 0.1}, "rounds": 2, "target": {"macs": 0.5}})
    chosen = make_base(prune, Training(epochs=10), seed=0)
    decay = sections.Decay(steps=2, rectify=Rectify(criterion="reselect"))
    with pytest.raises(RecipeError, match=r"decay\.rectify\.criterion is reselect, .* significance"):
        chosen.rounds(chosen.stages(), decay, steps_per_epoch=100)

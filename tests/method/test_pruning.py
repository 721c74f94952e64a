import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpm_cli.engine.learner import Learner
from dpm_cli.engine.precision import choose_precision
from dpm_cli.errors import RecipeError, RunError
from dpm_cli.graph import find_groups
from dpm_cli.method.budget import cost_of, find_width_limits, resolve_limit
from dpm_cli.method.pruners import DepGraph
from dpm_cli.method.pruning import Choice, Goal, Pruning
from dpm_cli.method.removal import Removal
from dpm_cli.method.rounds import Rounds, plan_rounds
from dpm_cli.recipe.sections import Decay, Prune, Rectify, Training


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.back = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.inner_norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


torch.manual_seed(0)
NET = Net()
NET(torch.randn(32, 1, 8, 8))  # real running statistics
NET.eval()
GROUPS = find_groups(NET, torch.zeros(2, 1, 8, 8))
IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 5
FP32 = choose_precision("fp32", torch.device("cpu"))


def make(*, steps=4, starts=(0, 4, 8), amount=0.5, kind="macs", rectify=None, round_to=1, optimizer="sgd"):
    """A model in training, its learner and its pruning. rectify: settings of a Rectify, unchecked."""
    model = copy.deepcopy(NET)
    model.to(memory_format=torch.channels_last)
    widths = find_width_limits(GROUPS, round_to=round_to, min_keep=0.1)
    rule = Rectify().model_copy(update=rectify) if rectify else None
    pruning = Pruning(
        model,
        GROUPS,
        DepGraph(Prune(target={kind: amount}, normalizer="mean", sparse_strength=0.0), Training(), seed=0),
        Goal(kind, resolve_limit(GROUPS, widths, kind=kind, amount=amount), widths),
        Rounds(starts, end=starts[-1] + steps, decay_steps=steps),
        Decay(steps=steps, rectify=None).model_copy(update={"rectify": rule}),
    )
    model.train()
    return model, make_learner(model, optimizer), pruning


def make_learner(model, optimizer="sgd"):
    training = Training(epochs=10, optimizer=optimizer, lr=0.05, momentum=0.9, schedule="cosine", weight_decay=1e-3)
    return Learner(model, training, precision=FP32, steps_per_epoch=10, seed=0)


def drive(learner, pruning, step):
    """One step as a run takes it; returns the rounds that started and the removals."""
    happened = []
    if pruning.is_due(step):
        happened.append(pruning.start_round())
    if pruning.is_over:
        happened.append(finish(learner, pruning))
    after = partial(pruning.after_step_, step, learner.learning_rate(step))
    learner.step_(IMAGES, LABELS, step=step, before=[pruning.before_step_], after=[after])
    if pruning.is_over:
        happened.append(finish(learner, pruning))
    return happened


def finish(learner, pruning):
    removal = pruning.finish_round(IMAGES)
    learner.shrink_(removal.before, removal.kept)
    return removal


def run(learner, pruning, steps, first=0):
    return [one for step in range(first, steps) for one in drive(learner, pruning, step)]


AGAIN = {"criterion": "reselect", "start": 0.5}
RELEASE_ALL = {"criterion": "significance", "rate": -float("inf"), "length": -float("inf"), "start": 0.0, "limit": 10}


# ------------------------------------------------------------------------------------------------------------- plans


def plan(steps, *, rounds=4, decay_steps=10, start=0.0, end=0.5, rectify=False):
    prune = Prune(target={"macs": 0.5}, rounds=rounds, start=start, end=end)
    rule = {"criterion": "significance"} if rectify else None
    return plan_rounds(steps, prune, Decay(steps=decay_steps, rectify=rule))


def test_rounds_are_spread_evenly_between_start_and_end():
    assert plan(100, rounds=4, start=0.2, end=0.6).starts == (20, 30, 40, 50)
    assert plan(100, rounds=2, rectify=True).starts == (0, 25)
    assert plan(10, rounds=10, decay_steps=1, end=1.0).starts == tuple(range(10))


def test_without_training_there_is_one_round():
    assert plan(0, start=0.2, end=0.6, rectify=True).starts == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 6}, "6 rounds of 10 decay steps do not fit"),
        ({"decay_steps": 13}, "4 rounds of 13 decay steps do not fit"),
        ({"decay_steps": 1, "rounds": 51}, "51 rounds of 1 decay steps do not fit"),
        ({"rectify": True, "end": 1.0}, "no room for 10 decay steps after prune.end"),
        ({"steps": 1}, "do not fit"),
    ],
)
def test_rounds_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        plan(**{"steps": 100} | changes)


def test_choosing_again_needs_no_room_to_replace_what_was_released():
    prune, again = Prune(target={"macs": 0.5}, rounds=1, end=1.0), Decay(steps=10, rectify={"criterion": "reselect"})
    assert plan_rounds(10, prune, again).starts == (0,)


def test_a_plan_that_just_fits_ends_at_the_last_step():
    starts = plan(50, end=0.8, rectify=True).starts
    _, learner, pruning = make(steps=10, starts=starts, rectify=RELEASE_ALL)
    run(learner, pruning, 50)
    assert pruning.is_done


# ------------------------------------------------------------------------------------------------------------ rounds


@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
@pytest.mark.parametrize("steps", [1, 4])
def test_each_round_takes_its_share_and_the_last_meets_the_target(kind, steps):
    _, learner, pruning = make(kind=kind, steps=steps)
    dense, limit, costs = pruning.cost(), pruning.goal.limit, []
    for step in range(12):
        for happened in drive(learner, pruning, step):
            if isinstance(happened, Choice):
                share = dense - (dense - limit) * happened.round // 3
                assert happened.limit == share
            else:
                costs.append(pruning.cost())
                assert costs[-1] <= share
                assert happened.removed > 0
    assert len(costs) == 3
    assert pruning.is_done
    assert pruning.cost() <= limit
    assert pruning.chosen == GROUPS.units - pruning.groups.units == int((~pruning.ancestry.survivors).sum())
    assert cost_of(GROUPS.cost, kind, pruning.ancestry.survivors) == pruning.cost()
    assert not pruning.is_due(12)


def test_predicted_cost_of_a_round_is_what_is_left_after_it():
    model, learner, pruning = make()
    (started, _) = run(learner, pruning, 4)
    assert started.predicted_macs == pruning.groups.cost.macs(pruning.all_alive)
    assert started.predicted_params == sum(parameter.numel() for parameter in model.parameters())


def test_rounds_last_exactly_the_decay_steps():
    model, learner, pruning = make(steps=4, starts=(2, 9))
    lengths = [sum(parameter.numel() for parameter in model.parameters())]
    for step in range(14):
        drive(learner, pruning, step)
        lengths.append(sum(parameter.numel() for parameter in model.parameters()))
    assert [step for step in range(14) if lengths[step + 1] < lengths[step]] == [5, 12]


def test_everything_released_still_ends_with_the_target_met():
    _, learner, pruning = make(rectify=RELEASE_ALL)
    happened = run(learner, pruning, 20)
    rounds = [one for one in happened if isinstance(one, Choice)]
    removals = [one for one in happened if isinstance(one, Removal)]
    assert [removal.released for removal in removals[:3]] == [one.chosen for one in rounds[:3]]
    assert [removal.removed for removal in removals[:3]] == [0, 0, 0]
    assert len(rounds) == 4
    assert rounds[3].limit == pruning.goal.limit
    assert removals[3].released == 0
    assert removals[3].removed == rounds[3].chosen
    assert pruning.is_done
    assert pruning.released == sum(one.chosen for one in rounds[:3])


def test_choosing_again_exchanges_units_and_meets_every_rounds_limit_without_another_round():
    _, learner, pruning = make(rectify=AGAIN)
    happened = run(learner, pruning, 12)
    rounds = [one for one in happened if isinstance(one, Choice)]
    removals = [one for one in happened if isinstance(one, Removal)]
    assert len(rounds) == len(removals) == 3
    assert pruning.is_done
    assert pruning.released > 0
    assert pruning.topped_up == 0
    assert pruning.chosen == pruning.released + sum(removal.removed for removal in removals)
    assert pruning.chosen > sum(one.chosen for one in rounds)  # others came in the place of those released


def test_the_base_hears_which_units_a_round_released(monkeypatch):
    heard = []
    monkeypatch.setattr(DepGraph, "unmark_", lambda self, released: heard.append(int(released.sum())))
    _, learner, pruning = make(rectify=RELEASE_ALL)
    happened = run(learner, pruning, 20)
    assert heard == [removal.released for removal in happened if isinstance(removal, Removal)]
    assert heard[0] > 0


def test_topping_up_takes_released_units_when_no_others_suffice():
    _, learner, pruning = make(starts=(0,), kind="channels", amount=4.0, rectify=RELEASE_ALL)
    happened = run(learner, pruning, 8)
    assert [one.chosen for one in happened if isinstance(one, Choice)] == [16, 16]
    assert pruning.is_done


def test_topping_up_spares_released_units_while_others_suffice():
    """They are the shortest of all, so any ranking by length would take them at once."""
    _, learner, pruning = make(starts=(0,), amount=0.8, rectify=RELEASE_ALL)
    run(learner, pruning, 1)
    released = pruning.decay.released.numpy().copy()
    assert released.sum() == pruning.chosen > 0
    happened = run(learner, pruning, 19, first=1)
    assert sum(one.chosen for one in happened if isinstance(one, Choice)) > 0
    assert pruning.is_done
    assert pruning.ancestry.survivors[released].all()


def test_released_units_rest_for_one_round():
    _, learner, pruning = make(rectify=RELEASE_ALL)
    run(learner, pruning, 4)
    first = pruning.decay.released.clone()
    (second,) = drive(learner, pruning, 4)
    assert first.any()
    assert second.chosen == pruning.decay.released.sum() > 0  # released in their first step, as always here
    assert not (pruning.decay.released & first).any()
    run(learner, pruning, 8, first=5)
    drive(learner, pruning, 8)
    assert (pruning.decay.released & first).any()


def test_a_skipped_optimizer_step_makes_the_round_longer_not_shorter():
    _, learner, pruning = make(steps=3, starts=(0,))
    pruning.start_round()
    for step in range(4):
        after = () if step == 1 else [pruning.decay.advance_]  # an fp16 scaler skips a step and what follows it
        learner.step_(IMAGES, LABELS, step=step, before=[pruning.decay.observe], after=after)
        assert pruning.is_over == (step == 3)
    removal = finish(learner, pruning)
    assert removal.removed == pruning.chosen
    assert pruning.is_done


# -------------------------------------------------------------------------------------------------------- compaction


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_the_optimizer_remembers_of_survivors_is_carried_over(optimizer):
    model, learner, pruning = make(steps=3, starts=(0,), optimizer=optimizer)
    pruning.start_round()
    for step in range(3):
        learner.step_(IMAGES, LABELS, step=step, before=[pruning.decay.observe], after=[pruning.decay.advance_])
    before = {
        name: {key: value.clone() for key, value in learner.optimizer.state[parameter].items() if value is not None}
        for name, parameter in model.named_parameters()
    }
    dead = pruning.decay.dead.numpy()
    keep = {group.name: np.flatnonzero(~dead[group.range]) for group in GROUPS}
    rows, inner = keep["stem"], keep["inner"]
    assert 0 < len(rows) < 8 or 0 < len(inner) < 12
    finish(learner, pruning)
    by_hand = {
        "stem.weight": lambda t: t[rows], "stem.bias": lambda t: t[rows], "norm.weight": lambda t: t[rows],
        "norm.bias": lambda t: t[rows], "inner.weight": lambda t: t[inner][:, rows],
        "inner_norm.weight": lambda t: t[inner], "inner_norm.bias": lambda t: t[inner],
        "back.weight": lambda t: t[rows][:, inner], "back.bias": lambda t: t[rows],
        "head.weight": lambda t: t[:, rows], "head.bias": lambda t: t,
    }  # fmt: skip
    assert by_hand.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        after = learner.optimizer.state[parameter]
        assert after.keys() == before[name].keys()
        for key, value in before[name].items():
            assert torch.equal(after[key], by_hand[name](value) if value.dim() else value)
    learner.step_(IMAGES, LABELS, step=3)  # and it goes on


def test_only_dead_units_are_removed_and_outputs_stay():
    model, learner, pruning = make(steps=2, starts=(0,))
    pruning.start_round()
    for step in range(2):
        learner.step_(IMAGES, LABELS, step=step, after=[pruning.decay.advance_])
    dense = copy.deepcopy(model).eval()
    model.inner.training = False  # as a frozen layer
    removal = finish(learner, pruning)
    assert 0 < removal.difference <= 1e-5 or removal.difference == 0
    assert model.training
    assert not model.inner.training
    torch.testing.assert_close(model.eval()(IMAGES), dense(IMAGES))


def corrupt_a_dead_unit(model, pruning):
    """As if something had revived it: its removal changes the outputs."""
    unit = int(pruning.decay.dead[GROUPS.groups[0].range].nonzero()[0])
    with torch.no_grad():
        model.get_parameter("norm.bias")[unit] = 0.5


def test_a_group_whose_removal_changes_the_outputs_is_kept_and_the_others_go_on():
    model, learner, pruning = make(steps=2, starts=(0,))
    pruning.start_round()
    for step in range(2):
        learner.step_(IMAGES, LABELS, step=step, after=[pruning.decay.advance_])
    corrupt_a_dead_unit(model, pruning)
    dense = copy.deepcopy(model).eval()
    removal = finish(learner, pruning)
    assert [kept.layer for kept in removal.held] == list(GROUPS.groups[0].layers)
    assert [group.name for group in pruning.groups] == ["inner"]
    assert 0 < removal.removed == int((~pruning.ancestry.survivors).sum())
    assert removal.difference <= 1e-5
    torch.testing.assert_close(model.eval()(IMAGES), dense(IMAGES))
    model.train()
    run(learner, pruning, 12, first=2)  # what the target lacks is taken from the other group
    assert pruning.is_done
    assert pruning.cost() <= pruning.wanted == pruning.goal.limit
    again, _, restored = make(steps=2, starts=(0,))
    restored.load_state_dict(copy.deepcopy(pruning.state_dict()))
    again.load_state_dict(model.state_dict())
    assert restored.groups.groups == pruning.groups.groups
    assert restored.is_done
    assert restored.ancestry.kept == pruning.ancestry.kept


def test_a_target_that_kept_layers_put_out_of_reach_is_replaced_by_what_can_be_reached():
    model, learner, pruning = make(steps=2, starts=(0,), amount=0.1)
    pruning.start_round()
    for step in range(2):
        learner.step_(IMAGES, LABELS, step=step, after=[pruning.decay.advance_])
    corrupt_a_dead_unit(model, pruning)
    finish(learner, pruning)
    run(learner, pruning, 12, first=2)
    assert pruning.is_done
    assert pruning.wanted < pruning.cost() <= pruning.goal.limit


def test_the_run_stops_when_nothing_is_left_that_could_be_removed(monkeypatch):
    _, _, pruning = make(steps=1, starts=(0,))
    pruning.start_round()
    monkeypatch.setattr("dpm_cli.graph.trial.compact_", lambda model, *_: model.head.bias.data.add_(1.0))
    with pytest.raises(RunError, match=r"changed the outputs by .*stops"):
        pruning.finish_round(IMAGES)


def test_not_a_number_in_the_outputs_stops_the_run_too():
    model, _, pruning = make(steps=1, starts=(0,))
    pruning.start_round()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(RunError, match="changed the outputs by inf"):
        pruning.finish_round(IMAGES)


# -------------------------------------------------------------------------------------------------------- round trip


RULES = {
    "cosine": {"criterion": "cosine", "rate": -0.05, "length": 0.9, "smoothing": 0.5, "start": 0.3, "hits": 2},
    "reselect": AGAIN,
}


@pytest.mark.parametrize(
    ("criterion", "stop"), [*(("cosine", stop) for stop in (0, 2, 4, 6, 9, 13)), ("reselect", 1), ("reselect", 3)]
)
def test_restored_pruning_goes_on_with_the_same_bits(criterion, stop):
    rule = RULES[criterion]
    model, learner, pruning = make(rectify=rule)
    run(learner, pruning, stop)
    again, _, restored = make(rectify=rule)
    restored.load_state_dict(copy.deepcopy(pruning.state_dict()))
    again.load_state_dict(model.state_dict())
    again_learner = make_learner(again)
    again_learner.load_state_dict(learner.state_dict())
    for step in range(stop, 18):
        drive(learner, pruning, step)
        drive(again_learner, restored, step)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert restored.is_done
    assert pruning.is_done
    assert (restored.chosen, restored.released) == (pruning.chosen, pruning.released)
    assert pruning.released > 0

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import SIZES, assert_same_model, batches, go, macs, make_net, make_optimizer
from small_runs import make_recipe as make_any_recipe
from torch import nn

from dpm_cli.errors import RecipeError
from dpm_cli.events import RoundStarted, StageBegan, UnitsRemoved
from dpm_cli.graph import Units, find_groups
from dpm_cli.method.decay import Decay
from dpm_cli.method.pruners import GateDecorator
from dpm_cli.method.pruners.gate_decorator import below_threshold, plan_ticks
from dpm_cli.recipe import sections
from dpm_cli.recipe.stages import Stage

DENSE = make_net()
GROUPS = find_groups(DENSE, torch.zeros(2, 1, 8, 8))
IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 10


def make_recipe(*overrides):
    return make_any_recipe("prune.base=gate-decorator", "prune.gates.tick_lr=0.01", *overrides)


def make_base(**gates):
    prune = sections.Prune(base="gate-decorator", target={"macs": 0.5}, gates={"strength": 0.1} | gates, min_keep=0.1)
    return GateDecorator(prune, sections.Training())


def prepared(**gates):
    """A gated net in training, and its base."""
    model, base = copy.deepcopy(DENSE), make_base(**gates)
    base.bind(base.prepare_(model, GROUPS), model)
    return model.train(), base


def enter(base, name, model):
    base.enter(next(stage for stage in base.stages() if stage.name == name), model, 0)


@pytest.mark.parametrize(("distill", "of_ticks"), [(0.7, 0.0), (0.0, 0.0), (1.0, 1.0)])
def test_ticks_judge_gates_by_the_task_and_not_by_the_teacher_unless_there_are_no_labels(distill, of_ticks):
    prune = sections.Prune(base="gate-decorator", target={"macs": 0.5})
    stages = GateDecorator(prune, sections.Training(distill=distill)).stages()
    assert {stage.training.distill for stage in stages if stage.name == "tick"} == {of_ticks}
    assert {stage.training.distill for stage in stages if stage.name == "tock"} == {distill}


def test_preparing_a_net_and_restoring_it_changes_no_output():
    model, base = prepared()
    torch.testing.assert_close(model.eval()(IMAGES), DENSE(IMAGES))
    base.restore_(model)
    torch.testing.assert_close(model(IMAGES), DENSE(IMAGES))
    assert [type(module) for module in model.modules()] == [type(module) for module in DENSE.modules()]


@pytest.mark.parametrize("change", ["frozen", "none"])
def test_group_without_a_gate_is_kept_whole_with_the_reason(change):
    model = copy.deepcopy(DENSE)
    if change == "frozen":
        model.inner_norm.weight.requires_grad_(False)
    else:
        model.inner_norm = nn.Identity()
    groups = make_base().choosable(find_groups(model, torch.zeros(2, 1, 8, 8)), model)
    assert [group.name for group in groups] == ["stem"]
    assert any(kept.layer == "inner" and "trainable BatchNorm" in kept.reason for kept in groups.kept)


# --------------------------------------------------------------------------------------------------- ticks and tocks


def backward(model, seed=0):
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    F.cross_entropy(model(images), LABELS).backward()


def test_scores_are_summed_over_the_batches_of_a_tick_and_over_the_gates_of_a_unit():
    model, base = prepared()
    enter(base, "tick", model)
    expected = torch.zeros(sum(SIZES))
    for seed in range(2):
        backward(model, seed)
        norms = model.norm, model.back_norm, model.inner_norm
        first, shared, second = ((norm.weight * norm.weight.grad).abs().detach() for norm in norms)
        expected += torch.cat([first + shared, second])
        base.before_step_()
        base.after_step_(0.1, base.marks)
    np.testing.assert_allclose(base.scores(), expected.numpy(), rtol=1e-5)
    enter(base, "tick", model)
    np.testing.assert_allclose(base.scores(), expected.numpy(), rtol=1e-5)  # until the next tick's first step
    base.before_step_()
    base.after_step_(0.1, base.marks)
    assert (base.scores() < expected.numpy()).all()


def test_tick_trains_no_convolution_and_a_tock_does():
    model, base = prepared()
    for stage in ("tick", "tock"):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        enter(base, stage, model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
        backward(model)
        base.before_step_()
        optimizer.step()
        for name, parameter in model.named_parameters():
            is_convolution = name in ("stem.weight", "inner.weight", "back.weight")
            assert torch.equal(parameter, before[name]) == (is_convolution and stage == "tick")
    enter(base, "tick", model)
    base.restore_(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_was_frozen_before_stays_frozen():
    model, base = prepared()
    model.stem.weight.requires_grad_(False)
    enter(base, "tick", model)
    enter(base, "tock", model)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["stem.weight"]


def test_tock_pulls_every_gate_by_its_sign_and_nothing_else():
    model, base = prepared(strength=0.1)
    enter(base, "tock", model)
    backward(model)
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    base.before_step_()
    for name, parameter in model.named_parameters():
        is_gate = name in ("norm.weight", "back_norm.weight", "inner_norm.weight")
        torch.testing.assert_close(parameter.grad, before[name] + (0.1 * parameter.sign() if is_gate else 0))


def test_only_the_gates_of_a_unit_decay_and_with_them_its_values():
    model, base = prepared()
    model.eval()
    groups = base.prepare_(model, GROUPS)
    gates, whole = base.decays(groups, model), Units(groups, model)
    decay = Decay(gates, steps=4, whole=whole)
    victims = np.zeros(groups.units, bool)
    victims[[2, 9]] = True
    before = copy.deepcopy(model)
    norms = torch.stack([model.norm.weight[2], model.back_norm.weight[2]]).norm(), model.inner_norm.weight[1].abs()
    decay.start(victims)
    for age in range(1, 5):
        with torch.no_grad():
            for name in ("norm", "back_norm", "inner_norm"):
                model.get_submodule(name).weight.mul_(1.3)  # training
        decay.advance_()
        now = torch.stack([model.norm.weight[2], model.back_norm.weight[2]]).norm(), model.inner_norm.weight[1].abs()
        for length, start in zip(now, norms):
            torch.testing.assert_close(length, start * (4 - age) / 4)
        is_dead = age == 4
        assert torch.equal(model.stem.weight[2], before.stem.weight[2]) != is_dead
        assert (whole.norm()[[2, 9]] == 0).all() == is_dead
    hidden = model.norm(model.stem(IMAGES)) + model.back_norm(model.back(F.relu(model.inner_norm(model.inner(
        F.relu(model.norm(model.stem(IMAGES))))))))  # fmt: skip
    assert not hidden[:, 2].any()


# --------------------------------------------------------------------------------------------------- the threshold


def reference_masks(scores, gates, group_of_unit, least, fraction):
    """Whose mask becomes zero, as the reference ranks (§3.3): per gate, in one sorted list."""
    ladder, protected = [], {}
    for group in sorted(set(group_of_unit)):
        mine = sorted((s for s, g in zip(scores, group_of_unit) if g == group), reverse=True)
        counts = {n for n, g in zip(gates, group_of_unit) if g == group}
        protected[group] = mine[least[group] - 1] if least[group] <= len(mine) else -1
        ladder += [s for s in mine[least[group] :] if s > 0 for _ in range(*counts)]
    ladder.sort()
    number = int(sum(gates) * fraction)
    threshold = ladder[min(number, len(ladder) - 1)] if ladder else 0
    return [not (s >= protected[g] or s > threshold) for s, g in zip(scores, group_of_unit)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    fraction=st.sampled_from([0.01, 0.1, 0.3, 0.9]),
    zeros=st.floats(0, 0.5),
)
def test_units_below_the_threshold_are_those_of_the_reference(seed, sizes, fraction, zeros):
    rng = np.random.default_rng(seed)
    group_of_unit = np.repeat(np.arange(len(sizes)), sizes)
    scores = np.where(rng.random(sum(sizes)) < zeros, 0, rng.permutation(np.arange(1.0, sum(sizes) + 1)))
    gates = rng.integers(1, 4, len(sizes))[group_of_unit]
    least = np.maximum(1, (0.3 * np.array(sizes)).astype(int))
    below = below_threshold(scores, gates, group_of_unit, least, fraction)
    expected = np.array(reference_masks(scores.tolist(), gates.tolist(), group_of_unit.tolist(), least, fraction))
    ties = (scores == 0) & ~expected & below  # the reference keeps all zeros of a group that it must keep some of
    np.testing.assert_array_equal(below & ~ties, expected)
    for group, size in enumerate(sizes):
        assert size - below[group_of_unit == group].sum() >= least[group]


def test_one_more_gate_than_the_fraction_goes_and_zeros_go_for_free():
    scores = np.array([0.0, 5, 3, 4, 1, 2, 9, 8])
    alone, group = np.ones(8, int), np.zeros(8, int)
    below = below_threshold(scores, alone, group, np.array([1]), 0.25)
    assert scores[below].tolist() == [0, 3, 1, 2]  # int(8 · 0.25) + 1 besides the zero
    below = below_threshold(scores, 2 * alone, group, np.array([1]), 0.25)  # every unit has two gates
    assert scores[below].tolist() == [0, 3, 1, 2]  # int(16 · 0.25) + 1 gates are two units and one more's first


def test_marked_units_stay_marked():
    model, base = prepared(fraction=0.1)
    enter(base, "tick", model)
    backward(model)
    base.before_step_()
    first = base.marked().clone()
    assert first.any()
    base.sums = torch.where(first, 1e9, base.sums)
    assert base.marked()[first].all()


def test_a_released_unit_is_judged_anew():
    _, base = prepared(fraction=0.1)
    first = base.marked().clone()
    base.unmark_(first)
    assert base.marked()[first].all()  # it still scores below the threshold
    base.unmark_(first)
    base.sums = torch.where(first, 1e9, base.sums)
    assert not base.marked()[first].any()


# ------------------------------------------------------------------------------------------------------------ rounds


def stages_of(*lengths):
    """Epochs of tock, tick, …, tock."""
    training = make_recipe().train
    names = ["tock", *["tick"] * (len(lengths) - 2), "tock"]
    return [
        Stage(name, training.model_copy(update={"epochs": epochs}), "", prunes=True, ends_with_pruning=True)
        for name, epochs in zip(names, lengths)
    ]


@pytest.mark.parametrize(("lengths", "decay_steps", "is_exact", "message"), [
    ((1, 1, 1, 1), 11, True, "11 decay steps do not fit into a tick of 10 steps"),
    ((1, 2, 2, 1), 11, True, "11 decay steps do not fit into a tock of 10 steps"),
    ((1, 1, 1, 1), 6, False, "no room for two times 6 decay steps"),
    ((1, 1, 1, 0), 1, True, "train.epochs is 0"),
])  # fmt: skip
def test_ticks_whose_decays_do_not_fit_are_refused(lengths, decay_steps, is_exact, message):
    stages = [stage for stage in stages_of(*lengths) if stage.training.epochs]
    with pytest.raises(RecipeError, match=message):
        plan_ticks(stages, sections.Decay(steps=decay_steps), steps_per_epoch=10, is_exact=is_exact)


def test_rounds_follow_the_ticks():
    rounds = plan_ticks(stages_of(2, 1, 1, 1), sections.Decay(steps=5), steps_per_epoch=10, is_exact=False)
    assert (rounds.starts, rounds.end) == ((30, 40), 50)


@pytest.mark.thorough
def test_target_that_fixed_ticks_miss_is_met_by_one_more_round(tmp_path, splits):
    recipe = make_recipe("prune.gates.fraction=0.05", "decay.steps=3")
    run, events, report = go(tmp_path, recipe, splits)
    assert [event.round for event in events if isinstance(event, RoundStarted)] == [1, 2, 3]
    assert report.target.is_met
    assert run.subject.pruning.topped_up > 0
    assert any("gate-decorator marked too few" in note for note in report.notes)


@pytest.mark.thorough
def test_ticks_end_when_the_target_is_met(tmp_path, splits):
    recipe = make_recipe("prune.gates.fraction=0.2", "prune.rounds=20", "train.epochs=1")
    run, events, report = go(tmp_path, recipe, splits)
    stages = [event.name for event in events if isinstance(event, StageBegan)]
    assert 2 < len(stages) < 15
    assert report.target.is_met
    assert run.subject.pruning.topped_up == 0


# ------------------------------------------------------------------------------- the base pruner itself, in whole runs


class PlainGates(nn.Module):
    """The net of these runs with its gates written out, y = g · (x̂ + b), and a mask for what is dead."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        for name in ("norm", "back_norm", "inner_norm"):
            norm = getattr(net, name)
            setattr(self, f"{name}_g", nn.Parameter(norm.weight.detach().clone()))
            setattr(self, f"{name}_b", nn.Parameter(norm.bias.detach() / norm.weight.detach()))
            norm.weight = norm.bias = None
        self.dead = set()

    def gated(self, name, x):
        norm, group = getattr(self.net, name), int(name == "inner_norm")
        x = F.batch_norm(x, norm.running_mean, norm.running_var, training=True, momentum=0.1)
        mask = torch.tensor([(group, unit) not in self.dead for unit in range(SIZES[group])])
        gate, shift = ((getattr(self, f"{name}_{kind}") * mask).view(1, -1, 1, 1) for kind in "gb")
        return gate * (x + shift)

    def forward(self, x):
        net = self.net
        x = F.relu(self.gated("norm", net.stem(x)))
        inner = F.relu(self.gated("inner_norm", net.inner(x)))
        return net.head(F.relu(x + self.gated("back_norm", net.back(inner))).mean((2, 3)))

    def gates(self):
        return {name: getattr(self, f"{name}_g") for name in ("norm", "back_norm", "inner_norm")}

    def merged(self):
        """As the state of a net without gates."""
        state = {name: tensor.detach() for name, tensor in self.net.state_dict().items() if "num_batches" not in name}
        for name, gate in self.gates().items():
            state[f"{name}.weight"] = gate.detach()
            state[f"{name}.bias"] = (gate * getattr(self, f"{name}_b")).detach()
        return state


def plain_ticks_and_tocks(recipe, splits):
    """Gate Decorator as a loop of its own: tock, ticks, tock; after a tick its share of the units with least score."""
    model, training, options = PlainGates(make_net()), recipe.train, recipe.prune.gates
    model.to(memory_format=torch.channels_last)
    dense, rounds = macs(*SIZES), recipe.prune.rounds
    limit, scores, done, epoch = math.floor(dense * recipe.prune.target.macs), None, 0, 0
    for stage in ("tock", *["tick"] * rounds, "tock"):
        if scores is not None:
            done += 1
            share, left = dense - (dense - limit) * done // rounds, lambda: [
                size - sum(g == group for g, _ in model.dead) for group, size in enumerate(SIZES)
            ]  # fmt: skip
            for unit in sorted(scores.keys() - model.dead, key=scores.get):
                if macs(*left()) > share and left()[unit[0]] > math.ceil(0.1 * SIZES[unit[0]]):
                    model.dead.add(unit)
        is_tick = stage == "tick"
        frozen = {f"net.{name}.weight" for name in ("stem", "inner", "back")} if is_tick else set()
        trained = [parameter for name, parameter in model.named_parameters() if name not in frozen]
        optimizer = make_optimizer(training, trained)
        epochs = options.tick_epochs if is_tick else training.epochs
        steps, step = epochs * 6, 0
        if is_tick:
            scores = {(group, unit): 0.0 for group, size in enumerate(SIZES) for unit in range(size)}
        for _ in range(epochs):
            for images, labels in batches(recipe, splits, epoch):
                cosine = 0.5 * training.lr * (1 + math.cos(math.pi * step / steps))
                optimizer.param_groups[0]["lr"] = options.tick_lr if is_tick else cosine
                optimizer.zero_grad()
                F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
                for name, gate in model.gates().items():
                    if is_tick:
                        for unit, score in enumerate((gate * gate.grad).abs().tolist()):
                            scores[int(name == "inner_norm"), unit] += score
                    elif done < rounds:  # at the target the penalty stops
                        gate.grad += options.strength * gate.detach().sign()
                optimizer.step()
                step += 1
            epoch += 1
    return model


@pytest.mark.parametrize("training", [
    ["train.momentum=0"], ["train.momentum=0.9", "prune.rounds=3"], ["train.optimizer=adamw", "train.lr=0.01"],
])  # fmt: skip
@pytest.mark.thorough
def test_one_step_without_rectifying_is_gate_decorator(tmp_path, splits, training):
    recipe = make_recipe("train.epochs=1", "prune.gates.tick_epochs=2", "prune.gates.strength=0.01", *training)
    run, events, _ = go(tmp_path, recipe, splits)
    rounds = recipe.prune.rounds
    assert [stage.name for stage in run.subject.stages] == ["tock", *["tick"] * rounds, "tock"]
    assert [event.step for event in events if isinstance(event, UnitsRemoved)] == [0] * rounds
    model = plain_ticks_and_tocks(recipe, splits)
    assert len(model.dead) > 5
    assert_same_model(run, model.merged(), model.dead)

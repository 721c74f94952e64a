import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_choice import choose_plainly
from small_runs import AXES, PER_EPOCH, ROWS, SIZES, assert_same_model, batches, go, macs, make_net, make_optimizer
from small_runs import make_recipe as make_any_recipe

from dpm_cli.events import UnitsRemoved
from dpm_cli.graph import find_groups
from dpm_cli.method.pruners import Otov2
from dpm_cli.method.pruners.otov2 import hesso_importance, penalty_strengths, salience
from dpm_cli.recipe.sections import Prune, Training

DENSE = make_net()
GROUPS = find_groups(DENSE, torch.zeros(2, 1, 8, 8))
UNITS = GROUPS.units
EVERY_UNIT = [(group, unit) for group, size in enumerate(SIZES) for unit in range(size)]


def vector(tensors, group, unit, removed=()):
    """All producer-side entries of one unit, without those that read removed ones."""
    rows = []
    for name in ROWS[group]:
        row = tensors[name][unit].double()
        if len(AXES[name]) > 1:
            row = row[[(AXES[name][1], column) not in removed for column in range(len(row))]]
        rows.append(row.flatten())
    return torch.cat(rows)


def make_base(**changes):
    settings = {"strength": 0.01, "amplify": 2.0, "ceiling": 10.0, "epsilon": 0.9, "tolerance": 0.05} | changes
    return Otov2(Prune(base="otov2", target={"macs": 0.5}, otov2=settings), Training())


def make_recipe(*overrides):
    return make_any_recipe("prune.base=otov2", *overrides)


def measures(rng, units=9):
    """‖x‖, ‖ĝ‖, <x, ĝ>, entries, live of random units: (units,) each."""
    x, g = rng.standard_normal((2, units, 7)) * rng.uniform(0.01, 3, (2, units, 1))
    numbers = np.linalg.norm(x, axis=1), np.linalg.norm(g, axis=1), (x * g).sum(1), rng.integers(1, 90, units)
    return (*(torch.tensor(each, dtype=torch.float64) for each in numbers), torch.tensor(rng.random(units) < 0.7))


def unit_length(values, live):
    length = math.sqrt(sum(v * v for v, is_live in zip(values, live) if is_live))
    return [v / length for v in values]


@pytest.mark.parametrize("seed", range(5))
def test_salience_is_that_of_a_slow_reference(seed):
    weight, gradient, dot, entries, live = measured = measures(np.random.default_rng(seed))
    cosines = [(d / (w * g)).item() for w, g, d in zip(weight, gradient, dot)]
    smallness = [(1 / (w / n + 1e-6)).item() for w, n in zip(weight, entries)]
    expected = [0.5 * c + 0.5 * s for c, s in zip(unit_length(cosines, live), unit_length(smallness, live))]
    np.testing.assert_allclose(salience(*measured).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_hesso_importance_is_that_of_a_slow_reference(seed):
    weight, gradient, dot, entries, live = measured = measures(np.random.default_rng(seed))
    rows = [
        (w, w / n, d / (w * g) + 1, abs(d), d * d / 2)
        for w, g, d, n in zip(*(each.tolist() for each in (weight, gradient, dot, entries)))
    ]
    columns = [unit_length(column, live) for column in zip(*rows)]
    expected = [0.2 * sum(each) for each in zip(*columns)]
    np.testing.assert_allclose(hesso_importance(*measured).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("score", [salience, hesso_importance])
def test_scores_do_not_depend_on_the_order_of_the_groups(score):
    measured = measures(np.random.default_rng(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(score(*(each[order] for each in measured)), score(*measured)[order])


def test_units_that_go_do_not_weigh_the_criteria_of_those_that_stay():
    """A unit that is almost zero is immensely small: with it, all others would differ by their cosines alone."""
    *measured, live = measures(np.random.default_rng(1))
    live[:] = True
    live[4] = False
    before = salience(*measured, live)
    measured[0][4] *= 1e-6
    measured[2][4] *= 1e-6
    after = salience(*measured, live)
    torch.testing.assert_close(after[live], before[live])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000), strength=st.sampled_from([1e-4, 1e-2, 1.0]), amplify=st.sampled_from([1.1, 2.0, 20.0])
)
def test_penalty_shortens_a_growing_unit_while_the_loss_still_falls(seed, strength, amplify):
    rng = np.random.default_rng(seed)
    x, g = rng.standard_normal((2, 6))
    if x @ g > 0:
        g = -g  # descent alone would lengthen the unit
    weight, gradient, dot = (torch.tensor([v]) for v in (np.linalg.norm(x), np.linalg.norm(g), x @ g))
    asked = penalty_strengths(weight, gradient, dot, strength=strength, amplify=amplify, ceiling=1e9).item()
    lowest, highest = -(x @ g) / np.linalg.norm(x), -(g @ g) * np.linalg.norm(x) / (x @ g)
    expected = max(amplify * lowest, strength)
    assert asked == pytest.approx(expected if expected < highest else (lowest + highest) / 2)
    assert lowest < asked < highest
    direction = -(g + asked * x / np.linalg.norm(x))
    assert direction @ g < 0
    assert np.linalg.norm(x + 1e-6 * direction) < np.linalg.norm(x)


def test_penalty_of_a_unit_that_shrinks_anyway_is_the_plain_strength_and_no_penalty_passes_the_ceiling():
    weight, gradient = torch.tensor([1.0, 1.0]), torch.tensor([5.0, 5.0])
    asked = penalty_strengths(weight, gradient, torch.tensor([0.3, -4.0]), strength=0.01, amplify=2, ceiling=10)
    torch.testing.assert_close(asked, torch.tensor([0.01, 0.1]))


def drive(model, base, optimizer, *, wanted=True, going=None, released=None, change_=lambda model: None):
    """One optimizer step under random gradients as `Pruning` takes it. Returns the weights before it."""
    none = torch.zeros(UNITS, dtype=torch.bool)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    going, released = (none if units is None else units for units in (going, released))
    base.meet(optimizer)
    base.before_step_()
    optimizer.step()
    change_(model)
    base.after_step_(optimizer.param_groups[0]["lr"], going)
    if wanted:
        base.mark_(going | released)
    return before


def bound(**changes):
    model, base = copy.deepcopy(DENSE), make_base(**changes)
    base.bind(GROUPS, model)
    return model, base


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_what_is_not_marked_takes_the_plain_step_to_the_bit(kind):
    model, base = bound(epsilon=0.0)
    plain = copy.deepcopy(model)
    optimizers = [kind(net.parameters(), 0.01, weight_decay=0.1) for net in (model, plain)]
    base.start_round(6, 100)
    marked = [EVERY_UNIT[i] for i in base.redundant.nonzero().flatten().tolist()]
    drive(model, base, optimizers[0])
    for parameter, other in zip(plain.parameters(), model.parameters()):
        parameter.grad = other.grad.clone()
    optimizers[1].step()
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert torch.equal(ours["head.weight"], theirs["head.weight"])
    for group, unit in EVERY_UNIT:
        is_same = torch.equal(vector(ours, group, unit), vector(theirs, group, unit))
        assert is_same == ((group, unit) not in marked)


def test_units_that_decay_or_were_released_are_not_pushed():
    model, base = bound()
    base.start_round(20, 100)
    going, released = torch.zeros(2, UNITS, dtype=torch.bool)
    first, second, third = base.redundant.nonzero().flatten().tolist()[:3]
    going[first] = released[second] = True
    plain = copy.deepcopy(model)
    drive(model, base, torch.optim.SGD(model.parameters(), 0.01), going=going, released=released)
    for parameter, other in zip(plain.parameters(), model.parameters()):
        parameter.data -= 0.01 * other.grad
    ours, theirs = ({name: p.detach() for name, p in net.named_parameters()} for net in (model, plain))
    for unit in (first, second, third):
        same = torch.allclose(vector(ours, *EVERY_UNIT[unit]), vector(theirs, *EVERY_UNIT[unit]), rtol=1e-6, atol=1e-8)
        assert same == (unit != third)


@pytest.mark.parametrize(("epsilon", "left", "is_hit"), [
    (0.95, 0.94, True), (0.95, 0.96, False), (0.0, 0.01, False), (0.0, -0.01, True),
])  # fmt: skip
def test_half_space_marks_what_loses_more_than_it_may_of_its_old_direction(epsilon, left, is_hit):
    model, base = bound(epsilon=epsilon, strength=1e-7, ceiling=1.0)
    base.start_round(6, 100)

    def shrink_(model):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(left * before[name])

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    drive(model, base, torch.optim.SGD(model.parameters(), 0.1), change_=shrink_)
    assert torch.equal(base.marked(), base.redundant if is_hit else torch.zeros_like(base.redundant))


def test_unit_that_is_zero_without_a_projection_is_marked_at_once():
    model, base = bound(epsilon=0.0, strength=1e-7, ceiling=1.0)
    base.start_round(1, 100)
    with torch.no_grad():
        for name in ROWS[1]:
            model.get_parameter(name)[5] = 0
    drive(model, base, torch.optim.SGD(model.parameters(), 1e-6))
    assert base.marked().nonzero().flatten().tolist() == [8 + 5]


@pytest.mark.parametrize(
    ("redundant", "tolerance", "expected"), [(6, 0.05, 7), (6, 0.07, 7), (6, 0.0, 6), (15, 1.0, 19)]
)
def test_as_many_units_are_marked_as_the_target_and_the_tolerance_ask(redundant, tolerance, expected):
    _, base = bound(tolerance=tolerance)
    scores = base.scores()
    base.start_round(redundant, 100)
    assert expected == int(min(redundant + tolerance * UNITS, 0.999 * UNITS))
    marked = base.redundant.numpy()
    per_group = [marked[:8].sum(), marked[8:].sum()]
    assert per_group[0] < 8
    assert per_group[1] < 12
    assert expected - marked.sum() == 0 or 7 in per_group or 11 in per_group  # one stays in every group
    if marked.sum() == expected:
        assert scores[marked].max() < scores[~marked].min()


def test_partition_is_made_once():
    model, base = bound()
    base.start_round(6, 100)
    marked = base.redundant.clone()
    drive(model, base, torch.optim.SGD(model.parameters(), 0.1))
    base.start_round(15, 100)
    assert torch.equal(base.redundant, marked)


def test_strength_left_out_shrinks_a_typical_unit_within_the_round_at_a_falling_rate():
    model, base = bound(strength=None)
    drive(model, base, torch.optim.SGD(model.parameters(), 0.02), wanted=False)
    lengths = [vector(dict(model.named_parameters()), *unit).norm().item() for unit in EVERY_UNIT]
    drive(model, base, torch.optim.SGD(model.parameters(), 0.02), wanted=False)
    base.start_round(9, 50)
    marked = sorted(length for length, is_marked in zip(lengths, base.redundant) if is_marked)
    assert base.used_strength == pytest.approx(3 * marked[(len(marked) - 1) // 2] / (0.02 * 50), rel=1e-5)


@pytest.mark.parametrize(("kind", "expected"), [
    (torch.optim.SGD, (1e-3, 2, 10, 0)), (torch.optim.Adam, (1e-2, 20, 1e3, 0)),
    (torch.optim.AdamW, (1e-2, 20, 1e3, 0.1)),
])  # fmt: skip
def test_settings_left_out_are_those_for_the_optimizer_that_takes_the_steps(kind, expected):
    model, base = bound(strength=None, amplify=None, ceiling=None)
    base.meet(kind(model.parameters(), 0.01, weight_decay=0.1))
    assert (base.used_strength, base.amplify, base.ceiling, base.decoupled_decay) == expected
    given = make_base()
    given.meet(kind(model.parameters(), 0.01))
    assert (given.used_strength, given.amplify, given.ceiling) == (0.01, 2, 10)


@pytest.mark.parametrize("wanted", [True, False])
def test_step_without_a_learning_rate_moves_nothing_and_leaves_finite_scores(wanted):
    model, base = bound()
    base.start_round(6, 100)
    before = drive(model, base, torch.optim.SGD(model.parameters(), 0.0), wanted=wanted)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert np.isfinite(base.scores()).all()
    assert not base.marked().any()


@pytest.mark.parametrize(("kind", "settings"), [
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}), (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
])  # fmt: skip
def test_update_stands_for_the_gradient_of_the_paper(kind, settings):
    """‖ĝ‖ and <x, ĝ> from what the optimizer did are those of its own formula."""
    model, base = bound()
    optimizer = kind(model.parameters(), 0.03, **settings)
    for _ in range(3):
        before = drive(model, base, optimizer, wanted=False)
    variant = {name: paper_gradient(optimizer, parameter) for name, parameter in model.named_parameters()}
    for unit, (group, row) in enumerate(EVERY_UNIT):
        x, g = vector(before, group, row), vector(variant, group, row)
        for name, expected in (("weight", x.norm()), ("gradient", g.norm()), ("dot", x @ g)):
            assert base._seen[name][unit].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


def paper_gradient(optimizer, parameter):
    """ĝ: the momentum buffer, or Adam's bias-corrected ratio (OTOv2's gradient variant), after the step."""
    state = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.SGD):
        return state["momentum_buffer"]
    step = state["step"].item()
    return (state["exp_avg"] / (1 - 0.9**step)) / ((state["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8)


# ------------------------------------------------------------------------------- the base pruner itself, in whole runs


def plain_dhspg(recipe, splits):
    """DHSPG as a loop of its own over the whole net, zero units staying zero. Returns the net, what is dead, and how
    many of it no projection had marked. What reads a dead unit counts as long as a run keeps it, until the epoch's
    or the round's end.
    """
    model, training, options = make_net().train(), recipe.train, recipe.prune.otov2
    model.to(memory_format=torch.channels_last)
    steps, limit = training.epochs * PER_EPOCH, math.floor(macs(*SIZES) * recipe.prune.target.macs)
    first, end = max(1, round(recipe.prune.start * steps)), round(recipe.prune.end * steps)
    optimizer = make_optimizer(training, model.parameters())
    parameters = dict(model.named_parameters())
    default = (1e-3, 2, 10) if training.optimizer == "sgd" else (1e-2, 20, 1e3)
    strength, amplify, ceiling = options.strength, options.amplify or default[1], options.ceiling or default[2]
    dead, removed, marked, redundant, topped_up, seen = set(), set(), set(), set(), 0, {}
    ones = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}

    def left(gone):
        return [size - sum(group == g for g, _ in gone) for group, size in enumerate(SIZES)]

    def salience():
        """Of live units, low is redundant, by the measures of the last step."""
        live = [unit for unit in EVERY_UNIT if unit not in dead]
        cosine = {u: seen[u][2] / (seen[u][0] * seen[u][1]) for u in live}
        small = {u: 1 / (seen[u][0] / len(vector(ones, *u, removed)) + 1e-6) for u in live}
        lengths = [math.sqrt(sum(v * v for v in values.values())) for values in (cosine, small)]
        return {u: -(cosine[u] / lengths[0] + small[u] / lengths[1]) for u in live}

    def order():
        return sorted(scores := salience(), key=scores.get)

    def take(candidates):
        """Those that bring the cost to the limit; of every group a tenth stays."""
        scores = salience()
        return choose_plainly(
            {unit: scores[unit] for unit in candidates},
            lambda taken: macs(*left(dead | taken)) <= limit,
            lambda unit, taken: left(dead | taken)[unit[0]] > math.ceil(0.1 * SIZES[unit[0]]),
        )

    torch.manual_seed(recipe.seed)
    step = 0
    for epoch in range(training.epochs):
        for images, labels in batches(recipe, splits, epoch):
            if step == first:
                redundant = set(order()[: int(min(len(take(order())) + options.tolerance * UNITS, 0.999 * UNITS))])
                for group, size in enumerate(SIZES):
                    if sum(g == group for g, _ in redundant) == size:
                        redundant.remove([unit for unit in order() if unit[0] == group][-1])
            if step == end and macs(*left(dead)) > limit:
                missing = take(order())
                topped_up, dead = len(missing), dead | missing
            zero_(parameters, dead)
            lr = training.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = lr
            before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            optimizer.zero_grad()
            F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
            gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
            optimizer.step()
            variant = {
                name: gradients[name] + training.weight_decay * before[name]
                if training.optimizer == "sgd" and not training.momentum
                else paper_gradient(optimizer, parameter)
                for name, parameter in parameters.items()
            }
            is_wanted = first <= step < end and macs(*left(dead)) > limit
            for group, unit in EVERY_UNIT:
                x, g = vector(before, group, unit, removed), vector(variant, group, unit, removed)
                length, dot = x.norm().item(), (x @ g).item()
                seen[group, unit] = (length, g.norm().item(), dot)
                if not is_wanted or (group, unit) not in redundant - dead:
                    continue
                penalty = strength
                if dot < 0:
                    lowest, highest = -dot / length, -(g @ g).item() * length / dot
                    penalty = min(max(amplify * lowest, strength), strength * ceiling)
                    penalty = (lowest + highest) / 2 if penalty >= highest else penalty
                with torch.no_grad():
                    for name in ROWS[group]:
                        parameters[name][unit] -= lr * penalty * before[name][unit] / (length + 1e-8)
                after = vector({name: p.detach() for name, p in parameters.items()}, group, unit, removed)
                if (after @ x).item() < options.epsilon * length**2:
                    marked.add((group, unit))
            if is_wanted:
                dead = dead | take([unit for unit in order() if unit in marked])
            zero_(parameters, dead)
            step += 1
            if step % PER_EPOCH == 0 or step == end or macs(*left(dead)) <= limit:
                removed = set(dead)
    return model, dead, topped_up


@torch.no_grad()
def zero_(parameters, dead):
    for group, unit in dead:
        for name in ROWS[group]:
            parameters[name][unit] = 0


@pytest.mark.parametrize(("training", "strength", "topped_up"), [
    (["train.momentum=0"], 1.0, True),
    (["train.momentum=0.9"], 3.0, False),
    (["train.momentum=0.9", "train.weight_decay=0.01", "prune.start=0.2", "prune.otov2.tolerance=0.4"], 1.0, True),
    (["train.optimizer=adam", "train.lr=0.01"], 10.0, False),
    (["train.optimizer=adamw", "train.lr=0.01", "train.weight_decay=0.1"], 1.0, True),
])  # fmt: skip
@pytest.mark.every(4)
def test_one_step_without_rectifying_is_dhspg(tmp_path, splits, training, strength, topped_up):
    recipe = make_recipe(*training, f"prune.otov2.strength={strength}", "prune.end=0.7")
    run, _, report = go(tmp_path, recipe, splits)
    model, dead, missing = plain_dhspg(recipe, splits)
    assert len(dead) - missing > 0
    assert (missing > 0) == topped_up
    assert run.subject.pruning.topped_up == missing
    assert any("chosen by score alone" in note for note in report.notes) == topped_up
    assert_same_model(run, model.state_dict(), dead)


@pytest.mark.parametrize(("kept", "rounds"), [(0.7, 1), (0.45, 3), (0.3, 4)])
@pytest.mark.thorough
def test_hesso_prunes_the_share_of_each_period_and_all_it_was_asked_for_in_the_end(tmp_path, splits, kept, rounds):
    """R units over the periods, R // P at each but for rounding, none of them twice (HESSO's reference code)."""
    recipe = make_recipe(
        "prune.base=otov2", "prune.otov2.variant=hesso", "decay.envelope=multiplicative", "decay.steps=2",
        f"prune.target.channels={kept}", f"prune.rounds={rounds}", "prune.end=0.8",
    )  # fmt: skip
    run, events, _ = go(tmp_path, recipe, splits)
    asked = UNITS - math.floor(kept * UNITS)
    removed = [event.removed for event in events if isinstance(event, UnitsRemoved)]
    assert sum(removed) == asked == UNITS - run.subject.pruning.ancestry.survivors.sum()
    assert len(removed) == rounds
    assert all(abs(count - asked / rounds) < 1 for count in removed)

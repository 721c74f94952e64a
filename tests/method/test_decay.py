import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpm_cli.graph import Units, find_groups
from dpm_cli.method.decay import Decay
from dpm_cli.method.rectify import Rectifier
from dpm_cli.recipe.sections import Rectify


class Net(nn.Module):
    """Two groups: 8 units tied by a residual add, 6 of their own; biases, norms and a shared batch of roles."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.back = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.inner_norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


torch.manual_seed(0)
NET = Net().eval()
GROUPS = find_groups(NET, torch.zeros(2, 1, 8, 8))
UNITS = GROUPS.units
ALL = np.ones(UNITS, bool)


def make(steps, *, seed=0, momentum=0.9, weight_decay=1e-2, lr=0.1, rectifier=None, envelope="exact"):
    """A net with random weights, its optimizer and its decay."""
    model = copy.deepcopy(NET)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=weight_decay)
    decay = Decay(Units(GROUPS, model), steps=steps, envelope=envelope, rectifier=rectifier)
    return model, optimizer, decay


def random_gradients_(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train_step_(model, optimizer, decay, seed):
    """One step under random gradients; returns the stepped weights before the decay touched them."""
    random_gradients_(model, seed)
    decay.observe()
    optimizer.step()
    stepped = [unit_vector(model, unit) for unit in range(UNITS)]
    decay.advance_()
    return stepped


def unit_vector(model, unit):
    """All producer-side entries of one unit, gathered one position at a time."""
    tensors = dict(model.named_parameters())
    return torch.cat(
        [
            tensors[part.tensor].detach().select(part.axis, int(position)).flatten().clone()
            for part in GROUPS.slices
            if part.role.is_scaled
            for position in np.flatnonzero(part.units == unit)
        ]
    )


def only(*units):
    victims = np.zeros(UNITS, bool)
    victims[list(units)] = True
    return victims


def rectifier_with(**settings):
    rule = Rectify(criterion="significance").model_copy(update=settings)  # unchecked: no recipe can ask for infinity
    return Rectifier(torch.from_numpy(GROUPS.group_of_unit), len(GROUPS), rule)


def never():
    return rectifier_with(rate=float("inf"), length=float("inf"))


def at_once(**changes):
    return rectifier_with(**{"rate": -float("inf"), "length": -float("inf"), "start": 0.0} | changes)


def test_the_net_has_the_groups_that_these_tests_assume():
    assert [group.size for group in GROUPS] == [8, 6]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    steps=st.integers(2, 12),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    lr=st.sampled_from([1e-3, 0.1, 3.0]),
    later=st.integers(1, 5),
)
@pytest.mark.thorough
def test_norm_falls_linearly_for_every_unit_at_its_own_age(seed, steps, momentum, weight_decay, lr, later):
    model, optimizer, decay = make(steps, seed=seed, momentum=momentum, weight_decay=weight_decay, lr=lr)
    started = dict.fromkeys((0, 3, 9), 0) | dict.fromkeys((1, 13), later)
    initial = {}
    for step in range(later + steps):
        for when in {0, later}:
            if step == when:
                chosen = [unit for unit in started if started[unit] == when]
                initial |= {unit: unit_vector(model, unit).norm() for unit in chosen}
                decay.start(only(*chosen))
        train_step_(model, optimizer, decay, seed=1000 * seed + step)
        for unit, length in initial.items():
            age = min(step + 1 - started[unit], steps)
            expected = length * (steps - age) / steps
            torch.testing.assert_close(unit_vector(model, unit).norm(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(decay.norms, decay.units.norm(), rtol=1e-5, atol=0)  # remembered, not measured
    assert set(np.flatnonzero(decay.dead)) == set(started)


def test_direction_is_left_to_the_training():
    model, optimizer, decay = make(10)
    decay.start(ALL)
    for step in range(9):
        stepped = train_step_(model, optimizer, decay, step)
        for unit in range(UNITS):
            cosine = F.cosine_similarity(unit_vector(model, unit).double(), stepped[unit].double(), dim=0)
            assert cosine.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_dead_units_stay_exactly_zero(kind):
    model, optimizer, decay = make(3)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    decay.start(only(0, 5, 8))
    for step in range(103):
        train_step_(model, optimizer, decay, step)
        if step >= 2:
            assert all((unit_vector(model, unit) == 0).all() for unit in (0, 5, 8))
    assert (unit_vector(model, 1) != 0).all()


def test_units_that_do_not_decay_are_bitwise_those_of_plain_training():
    model, optimizer, decay = make(5)
    plain, plain_optimizer, _ = make(5)
    decay.start(only(2, 10))
    for step in range(7):
        train_step_(model, optimizer, decay, step)
        random_gradients_(plain, step)
        plain_optimizer.step()
        for unit in set(range(UNITS)) - {2, 10}:
            assert torch.equal(unit_vector(model, unit), unit_vector(plain, unit))
        assert torch.equal(model.head.weight, plain.head.weight)
        assert torch.equal(model.head.bias, plain.head.bias)


def test_one_step_is_zero_at_once():
    model, _, decay = make(1)
    expected = copy.deepcopy(model)
    decay.start(only(4, 11))
    assert decay.dead.nonzero().flatten().tolist() == [4, 11]
    assert not decay.decaying.any()
    assert decay.remaining == 0
    for unit in range(UNITS):
        before = unit_vector(expected, unit)
        assert torch.equal(unit_vector(model, unit), before * 0 if unit in (4, 11) else before)


def test_unit_without_length_is_dead_at_once_and_one_that_loses_it_at_that_step():
    model, optimizer, decay = make(10, momentum=0.0, weight_decay=0.0, lr=1.0)
    decay.units.scale_(torch.from_numpy(np.where(only(3), 0.0, 1.0)).float())
    decay.start(only(3, 7))
    assert decay.dead.nonzero().flatten().tolist() == [3]
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()  # lr 1: everything lands on zero
    optimizer.step()
    decay.advance_()
    assert decay.dead.nonzero().flatten().tolist() == [3, 7]
    train_step_(model, optimizer, decay, 0)
    assert (unit_vector(model, 7) == 0).all()


def test_decaying_and_dead_units_cannot_be_chosen_again():
    model, optimizer, decay = make(4)
    decay.start(only(0))
    for step in range(2):
        train_step_(model, optimizer, decay, step)
    decay.start(only(0, 1))
    assert decay.age[[0, 1]].tolist() == [2, 0]
    for step in range(2, 4):
        train_step_(model, optimizer, decay, step)
    decay.start(only(0))
    assert decay.dead[0]
    assert not decay.decaying[0]


def test_shrink_only_never_enlarges():
    model, optimizer, decay = make(20, momentum=0.0, lr=0.05, envelope="shrink-only")
    decay.start(ALL)
    enlarged_by_exact = 0
    for step in range(20):
        # Training pulls inwards faster than the envelope at some steps, slower at others.
        random_gradients_(model, step)
        for parameter in model.parameters():
            parameter.grad += (4 if step % 3 == 0 else 0) * parameter.detach()
        decay.observe()
        optimizer.step()
        stepped = torch.stack([unit_vector(model, unit).norm() for unit in range(UNITS)])
        envelope = decay.initial * (20 - step - 1) / 20
        decay.advance_()
        after = torch.stack([unit_vector(model, unit).norm() for unit in range(UNITS)])
        torch.testing.assert_close(after, torch.minimum(stepped, envelope), rtol=1e-5, atol=1e-7)
        enlarged_by_exact += int((envelope > stepped).sum())
    assert enlarged_by_exact > 0
    assert decay.dead.all()


def test_rectifier_that_never_releases_leaves_the_bits_of_smooth_pruning():
    model, optimizer, decay = make(5, rectifier=never())
    plain, plain_optimizer, smooth = make(5)
    for one in (decay, smooth):
        one.start(only(0, 1, 9))
    for step in range(6):
        train_step_(model, optimizer, decay, step)
        train_step_(plain, plain_optimizer, smooth, step)
        for left, right in zip(model.parameters(), plain.parameters()):
            assert torch.equal(left, right)
    assert not decay.released.any()


def test_released_unit_keeps_its_updated_weights_and_is_never_rescaled():
    model, optimizer, decay = make(8, rectifier=at_once(start=0.3))
    decay.start(only(2, 12))
    for step in range(12):
        stepped = train_step_(model, optimizer, decay, step)
        assert decay.released[[2, 12]].tolist() == [step >= 2] * 2  # judged from age 3 on
        if step >= 2:
            for unit in (2, 12):
                assert torch.equal(unit_vector(model, unit), stepped[unit])
    assert not decay.dead.any()
    assert not decay.decaying.any()
    assert decay.releases.sum() == 2


def test_unit_is_released_no_more_often_than_its_limit():
    model, optimizer, decay = make(3, rectifier=at_once(limit=2))
    for start in range(3):
        decay.start(only(6))
        for step in range(3):
            train_step_(model, optimizer, decay, 10 * start + step)
        assert decay.releases[6] == min(start + 1, 2)
        assert bool(decay.released[6]) == (start < 2)
    assert decay.dead[6]


def test_round_that_must_not_rectify_ends_with_all_its_victims_dead():
    model, optimizer, decay = make(3, rectifier=at_once())
    decay.start(ALL, rectify=False)
    for step in range(3):
        train_step_(model, optimizer, decay, step)
    assert decay.dead.all()
    assert not decay.releases.any()


def test_remaining_counts_steps_until_all_decays_are_over():
    model, optimizer, decay = make(3)
    assert decay.remaining == 0
    decay.start(only(0))
    assert decay.remaining == 3
    train_step_(model, optimizer, decay, 0)
    decay.start(only(1))
    assert decay.remaining == 3
    for step in range(4):
        train_step_(model, optimizer, decay, step)
    assert decay.remaining == 0
    assert decay.dead.nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize(("criterion", "rate"), [("cosine", 0.02), ("significance", -1.0)])
def test_state_round_trip_continues_identically(stop, criterion, rate):
    def rectifier():
        return at_once(criterion=criterion, rate=rate, length=0.9, hits=2, smoothing=0.5)

    model, optimizer, decay = make(6, rectifier=rectifier())
    decay.start(ALL)
    for step in range(stop):
        train_step_(model, optimizer, decay, step)

    again, again_optimizer, restored = make(6, seed=1, rectifier=rectifier())
    again.load_state_dict(model.state_dict())
    again_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    restored.load_state_dict(copy.deepcopy(decay.state_dict()))
    for step in range(stop, 7):
        train_step_(model, optimizer, decay, step)
        train_step_(again, again_optimizer, restored, step)
        for left, right in zip(model.parameters(), again.parameters()):
            assert torch.equal(left, right)
    assert torch.equal(decay.released, restored.released)
    assert 0 < decay.released.sum() < UNITS


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_multiplicative_envelope_is_that_of_hesso(steps):
    """Without training the norm falls linearly; a step of training survives in proportion, (N − n)/(N − n + 1)."""
    model, _, decay = make(steps, envelope="multiplicative")
    lengths = [unit_vector(model, unit).norm() for unit in range(UNITS)]
    decay.start(ALL)
    for age in range(1, steps + 1):
        decay.advance_()
        for unit, length in enumerate(lengths):
            torch.testing.assert_close(unit_vector(model, unit).norm(), length * (steps - age) / steps)
    assert decay.dead.all()

    model, optimizer, decay = make(5, envelope="multiplicative")
    decay.start(ALL)
    for age in range(1, 6):
        stepped = train_step_(model, optimizer, decay, age)
        for unit, before in enumerate(stepped):
            torch.testing.assert_close(unit_vector(model, unit), before * (5 - age) / (6 - age))


def test_only_a_part_shrinks_and_the_whole_is_zero_in_the_end():
    model, optimizer, _ = make(4)
    part, whole = Units(GROUPS, model, only={"norm.weight", "inner_norm.weight"}), Units(GROUPS, model)
    decay = Decay(part, steps=4, whole=whole)
    decay.start(only(1, 9))
    lengths = part.norm()[[1, 9]]
    for age in range(1, 7):
        stepped = train_step_(model, optimizer, decay, age)
        torch.testing.assert_close(part.norm()[[1, 9]], lengths * max(4 - age, 0) / 4, rtol=1e-5, atol=0)
        for unit in (1, 9):
            changed = unit_vector(model, unit) != stepped[unit]
            assert changed.sum() == 1 if age < 4 else not unit_vector(model, unit).any()
        assert torch.equal(unit_vector(model, 0), stepped[0])

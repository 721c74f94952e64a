import copy
import itertools
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpm_cli.graph import Units, find_groups
from dpm_cli.method.decay import Decay
from dpm_cli.method.rectify import (
    Rectifier,
    cosine_rate,
    norm_per_decay,
    norm_per_update,
    norm_relative,
    relative_length,
)
from dpm_cli.recipe.sections import Rectify

CRITERIA = ["cosine", "norm_per_update", "norm_per_decay", "norm_relative", "significance"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))).mean((2, 3)))


torch.manual_seed(0)
NET = Net().eval()
GROUPS = find_groups(NET, torch.zeros(2, 1, 8, 8))
UNITS = GROUPS.units
GROUP_OF_UNIT = torch.from_numpy(GROUPS.group_of_unit)


def vectors(model, *, gradient=False):
    """Every unit's producer-side weights or gradients, one position at a time."""
    tensors = {name: p.grad if gradient else p.detach() for name, p in model.named_parameters()}
    return [
        torch.cat(
            [
                tensors[part.tensor].select(part.axis, int(position)).flatten().double()
                for part in GROUPS.slices
                if part.role.is_scaled
                for position in np.flatnonzero(part.units == unit)
            ]
        )
        for unit in range(UNITS)
    ]


def lengths(x, g):
    return x.norm(dim=1), g.norm(dim=1)


def test_gradient_that_only_lengthens_is_plus_one_and_that_only_shortens_minus_one():
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    for g, expected in ((-3 * x, 1.0), (0.1 * x, -1.0)):
        weight, gradient = lengths(x, g)
        rate = cosine_rate((x * g).sum(1), weight, gradient)
        torch.testing.assert_close(rate, torch.full((6,), expected))
        moved = x - 0.01 * g
        rate = norm_per_update(moved.norm(dim=1), weight, (moved - x).norm(dim=1))
        torch.testing.assert_close(rate, torch.full((6,), expected), rtol=1e-3, atol=0)
        assert (norm_relative(moved.norm(dim=1), weight) * expected > 0).all()


def test_orthogonal_gradient_has_cosine_zero():
    x, g = torch.zeros(1, 4), torch.zeros(1, 4)
    x[0, :2], g[0, 2:] = 1, 1
    assert cosine_rate((x * g).sum(1), *lengths(x, g)).item() == 0


def test_cosine_does_not_depend_on_scale_and_is_zero_without_a_gradient():
    x, g = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1))
    rates = [cosine_rate((a * b * x * g).sum(1), *lengths(a * x, b * g)) for a, b in ((1, 1), (100, 1), (1, 1e-3))]
    torch.testing.assert_close(rates[1], rates[0])
    torch.testing.assert_close(rates[2], rates[0])
    assert cosine_rate(torch.zeros(1), torch.ones(1), torch.zeros(1)).item() == 0


def test_undoing_one_step_of_the_decay_is_rate_one():
    assert norm_per_decay(torch.tensor([1.1]), torch.tensor([1.0]), torch.tensor([0.1])).item() == pytest.approx(1)


def test_equal_gradients_have_relative_length_one():
    ratio = relative_length(torch.full((UNITS,), 3.0), GROUP_OF_UNIT, len(GROUPS))
    torch.testing.assert_close(ratio, torch.ones(UNITS))


def test_relative_length_is_one_on_average_over_each_group():
    ratio = relative_length(torch.rand(UNITS) * 7, GROUP_OF_UNIT, len(GROUPS))
    for group in GROUPS:
        assert ratio[group.range].mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.isfinite(relative_length(torch.zeros(UNITS), GROUP_OF_UNIT, len(GROUPS))).all()


class SlowUnit:
    """One unit under Smooth Pruning and Self-Rectifying, in Python's own numbers."""

    def __init__(self, length, settings, steps):
        self.initial, self.s, self.steps = length, settings, steps
        self.age = self.hits = self.releases = 0
        self.mean_rate = self.mean_length = 0.0
        self.rates = []
        self.state = "decaying"

    def advance(self, x, g, updated, mean_gradient):
        """x, g: before the step; updated: after it. Returns the norm it must have, or None for "as it is"."""
        if self.state != "decaying":
            return 0.0 if self.state == "dead" else None
        s, self.age = self.s, self.age + 1
        grown = (updated.norm() - x.norm()).item()
        rate = {
            "cosine": -(x @ g).item() / (x.norm() * g.norm()).item(),
            "norm_per_update": grown / (updated - x).norm().item(),
            "norm_per_decay": grown * self.steps / self.initial,
            "norm_relative": grown / x.norm().item(),
        }[s["criterion"].replace("significance", "cosine")]
        self.rates.append(rate)
        self.mean_rate = s["smoothing"] * self.mean_rate + (1 - s["smoothing"]) * rate
        self.mean_length = s["smoothing"] * self.mean_length + (1 - s["smoothing"]) * g.norm().item() / mean_gradient
        unbiased = 1 - s["smoothing"] ** self.age
        escapes = self.mean_rate / unbiased > s["rate"]
        if s["criterion"] == "significance":
            n = len(self.rates)
            error = statistics.stdev(self.rates) / n**0.5 if n > 1 else math.inf
            escapes = statistics.mean(self.rates) / error > s["rate"]
        both = (escapes, self.mean_length / unbiased > s["length"])
        calls = (all if s["combine"] == "and" else any)(both) and self.age > s["start"] * self.steps
        self.hits = self.hits + 1 if calls else 0
        if self.hits >= s["hits"] and self.releases < s["limit"]:
            self.state, self.releases = "released", self.releases + 1
            return None
        if self.age == self.steps:
            self.state = "dead"
        return self.initial * (self.steps - self.age) / self.steps


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(2, 9),
    criterion=st.sampled_from(CRITERIA),
    combine=st.sampled_from(["and", "or"]),
    rate=st.sampled_from([-0.5, -0.05, 0.0, 0.05, 0.3]),
    length=st.sampled_from([0.5, 0.9, 1.0, 1.2]),
    smoothing=st.sampled_from([0.0, 0.5, 0.9]),
    start=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    hits=st.integers(1, 3),
    limit=st.integers(0, 1),
)
@pytest.mark.thorough
def test_release_rule_is_that_of_a_slow_reference(seed, steps, **rule):
    # A rate "norm_relative" is tiny and one "norm_per_decay" is large: both still cross some of these thresholds.
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(NET)
    decay = Decay(Units(GROUPS, model), steps=steps, rectifier=Rectifier(GROUP_OF_UNIT, len(GROUPS), Rectify(**rule)))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-2)
    victims = torch.rand(UNITS, generator=generator) < 0.7
    slow = {u: SlowUnit(vectors(model)[u].norm().item(), rule, steps) for u in range(UNITS) if victims[u]}
    decay.start(victims)
    for _ in range(steps + 1):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        x, g = vectors(model), vectors(model, gradient=True)
        decay.observe()
        optimizer.step()
        updated = vectors(model)
        decay.advance_()
        after = vectors(model)
        for unit in range(UNITS):
            group = next(group for group in GROUPS if unit in range(group.start, group.start + group.size))
            mean_gradient = sum(g[other].norm().item() for other in range(*group.range.indices(UNITS))) / group.size
            wanted = slow[unit].advance(x[unit], g[unit], updated[unit], mean_gradient) if unit in slow else None
            if wanted is None:
                assert torch.equal(after[unit], updated[unit])
            else:
                assert after[unit].norm().item() == pytest.approx(wanted, rel=1e-5)
    for unit, expected in slow.items():
        assert bool(decay.released[unit]) == (expected.state == "released")
        assert bool(decay.dead[unit]) == (expected.state == "dead")


def test_the_rule_above_sees_both_outcomes_for_every_criterion():
    outcomes = {criterion: set() for criterion in CRITERIA}
    for criterion, seed in itertools.product(CRITERIA, range(3)):
        rule = Rectify(rate=0.0, length=1.0, criterion=criterion, smoothing=0.5, start=0.0)
        rectifier = Rectifier(GROUP_OF_UNIT, len(GROUPS), rule)
        model = copy.deepcopy(NET)
        decay = Decay(Units(GROUPS, model), steps=5, rectifier=rectifier)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        generator = torch.Generator().manual_seed(seed)
        decay.start(np.ones(UNITS, bool))
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            decay.observe()
            optimizer.step()
            decay.advance_()
        outcomes[criterion] |= set(decay.released.tolist())
    assert outcomes == {criterion: {True, False} for criterion in CRITERIA}


def test_smoothing_forgets_an_earlier_decay():
    rule = Rectify(criterion="cosine", rate=0.5, start=0.0, limit=5).model_copy(update={"length": -math.inf})
    rectifier = Rectifier(GROUP_OF_UNIT, len(GROUPS), rule)
    decaying, age = torch.ones(UNITS, dtype=torch.bool), torch.ones(UNITS, dtype=torch.int64)
    model = copy.deepcopy(NET)
    units = Units(GROUPS, model)

    def judge(gradient_sign, decaying, age):
        for parameter in model.parameters():
            parameter.grad = gradient_sign * parameter.detach().clone()
        rectifier.observe(units, units.norm())
        return rectifier.judge(units, units.norm(), decaying, age, units.norm(), 10)

    assert judge(-1, decaying, age).all()  # cosine +1
    assert not judge(+1, ~decaying, age).any()  # a step without decay in between
    assert judge(-1, decaying, age).all()
    torch.testing.assert_close(rectifier.mean_rate, torch.full((UNITS,), 0.1))

"""Latency: units are chosen by what is lost per time saved, because runtimes compute channels in blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpm_cli.graph import find_groups
from dpm_cli.method.budget import Several, choose_victims, cost_of, find_width_limits

torch.manual_seed(0)
NET = nn.Sequential(
    *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)),
)
GROUPS = find_groups(NET.eval(), torch.zeros(2, 1, 12, 12))
FIRST, SECOND, THIRD = (group.range for group in GROUPS)
WIDTHS = find_width_limits(GROUPS, round_to=2, min_keep=0.1)
ALL = np.ones(GROUPS.units, bool)


class Blocks:
    """A runtime that computes so many channels at once: each block of a group takes as long as it costs."""

    def __init__(self, block=4, costs=(1000, 1000, 1000)):
        self.block, self.costs = block, costs

    def __str__(self):
        return "latency"

    def count(self, cost, alive):
        left = [int(alive[group.range].sum()) for group in GROUPS]
        return sum(each * -(-width // self.block) for each, width in zip(self.costs, left))


def lost(scores, victims):
    return (scores - scores.min())[victims].sum()


def ranked(scores, latency, limit):
    """The first set in the order of the scores that fits, a pair of units at a time as `round_to` asks."""
    victims = np.zeros(GROUPS.units, bool)
    least = WIDTHS.lowest(GROUPS)
    for unit in np.argsort(scores, kind="stable"):
        group = next(each for each in GROUPS if each.start <= unit < each.start + each.size)
        left = (~victims)[group.range].sum()
        if latency.count(None, ~victims) > limit and left > least[group.range].sum():
            victims[unit] = True
    return victims


def test_losses_are_traded_for_any_cost():
    """The dearest group loses most: equal losses go where a unit saves most, though all are ranked alike."""
    scores = np.full(GROUPS.units, 0.1)
    saved = []
    for group in GROUPS:
        alive = ALL.copy()
        alive[group.start : group.start + 2] = False
        saved.append(GROUPS.cost.macs(ALL) - GROUPS.cost.macs(alive))
    limit = GROUPS.cost.macs(ALL) - max(saved)
    victims = choose_victims(GROUPS, WIDTHS, scores, kind="macs", limit=limit, traded=True)
    assert victims.sum() == 2
    assert victims[list(GROUPS)[int(np.argmax(saved))].range].sum() == 2
    assert GROUPS.cost.macs(~victims) <= limit


def test_a_narrower_layer_that_is_no_faster_is_left_alone():
    scores = np.concatenate([np.full(16, 0.1), np.full(16, 0.2), np.full(12, 0.2)])
    latency = Blocks(block=16, costs=(1000, 1000, 1000))  # one block each: nothing narrower is faster
    cheap = Blocks(block=4)

    class Mixed(Blocks):
        """Only the last group has smaller blocks."""

        def count(self, cost, alive):
            return latency.count(cost, alive) + cheap.count(cost, alive | (np.arange(GROUPS.units) < THIRD.start))

    victims = choose_victims(GROUPS, WIDTHS, scores, kind=Mixed(), limit=Mixed().count(None, ALL) - 1000)
    assert not victims[: THIRD.start].any()  # the lowest scores
    assert victims[THIRD].sum() == 4


def test_several_steps_go_at_once_where_one_saves_nothing():
    scores = np.concatenate([np.full(16, 1.0), np.full(16, 5.0), np.full(12, 5.0)])
    scores[0] = 0.0  # a loss is what is above the lowest score
    latency = Blocks(block=8, costs=(1000, 10, 10))
    victims = choose_victims(GROUPS, WIDTHS, scores, kind=latency, limit=latency.count(None, ALL) - 1000)
    assert [int(victims[each].sum()) for each in (FIRST, SECOND, THIRD)] == [8, 0, 0]


def test_weights_say_which_group_is_dear():
    scores = np.ones(GROUPS.units)
    scores[[0, 16, 32]] = 0.0
    latency = Blocks()
    limit = latency.count(None, ALL) - 1000
    for cheap, group in enumerate((FIRST, SECOND, THIRD)):
        weights = np.full(3, 2.0)
        weights[cheap] = 1.0
        victims = choose_victims(GROUPS, WIDTHS, scores, kind=latency, limit=limit, weights=weights)
        assert victims[group].sum() == victims.sum() == 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    share=st.floats(0, 0.999),
    block=st.sampled_from([1, 4, 8]),
    with_macs=st.booleans(),
    gone=st.sampled_from([0.0, 0.2]),
)
def test_every_limit_is_met_from_the_lowest_scores_of_each_group(seed, share, block, with_macs, gone):
    rng = np.random.default_rng(seed)
    scores, alive, latency = rng.random(GROUPS.units), rng.random(GROUPS.units) >= gone, Blocks(block, (900, 2000, 400))
    lowest, dense = (latency.count(None, each) for each in (WIDTHS.lowest(GROUPS), alive))
    limit = lowest + round(share * max(0, dense - lowest))
    kind, allowed = latency, limit
    if with_macs:
        fewest, most = (cost_of(GROUPS.cost, "macs", each) for each in (WIDTHS.lowest(GROUPS), alive))
        kind = Several(((latency, limit), ("macs", fewest + round(0.5 * max(0, most - fewest)))))
        allowed = Several.WHOLE
    victims = choose_victims(GROUPS, WIDTHS, scores, kind=kind, limit=allowed, alive=alive)
    left = alive & ~victims
    assert not (victims & ~alive).any()
    assert kind.count(GROUPS.cost, left) <= allowed
    for number, group in enumerate(GROUPS):
        own = left[group.range].sum()
        assert own == group.size or own % WIDTHS.step[number] == 0
        if victims[group.range].any() and own:
            assert scores[group.range][victims[group.range]].max() <= scores[group.range][left[group.range]].min()


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_less_is_lost_than_by_rank(share):
    latency, ours, theirs = Blocks(4, (3000, 300, 1000)), [], []
    for seed in range(20):
        scores = np.random.default_rng(seed).random(GROUPS.units)
        limit = int(share * latency.count(None, ALL))
        ours.append(lost(scores, choose_victims(GROUPS, WIDTHS, scores, kind=latency, limit=limit)))
        theirs.append(lost(scores, ranked(scores, latency, limit)))
    assert np.mean(ours) < 0.9 * np.mean(theirs)

"""Removal is carried out for real before it is promised: what changes outputs is kept, whatever the rules say."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dpm_cli.graph import Units, find_groups
from dpm_cli.graph.analysis import trace_groups
from dpm_cli.graph.lively import make_lively
from dpm_cli.graph.rehearsal import rehearse_survivors, rehearse_values
from dpm_cli.graph.rules.elementwise import keeps_zero
from dpm_cli.graph.rules.registry import RULES
from dpm_cli.graph.search import find_broken
from dpm_cli.graph.trial import CHANGES, Trial, outputs_of

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """Takes a number from how many channels there are, as attention does with `sqrt(q.shape[-1])`."""

    def __init__(self):
        super().__init__()
        self.stem, self.scaled, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.scaled(self.stem(x).relu()).relu()
        return self.head(x / math.sqrt(x.shape[1])).mean((2, 3))


class Softmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(self.mix(self.stem(x)).softmax(1)).mean((2, 3))


class Quoting(nn.Module):
    """Two layers write how many heads they have left into one place."""

    def __init__(self):
        super().__init__()
        self.heads = 8
        self.left, self.right = (nn.ModuleDict({"q": nn.Linear(6, 32), "o": nn.Linear(32, 6)}) for _ in range(2))

    def forward(self, x):
        x = x.flatten(2).mT[:, :4]  # (B, N, C)
        for part in (self.left, self.right):
            q = part["q"](x).reshape(len(x), 4, self.heads, 4).transpose(1, 2)
            x = x + part["o"]((q @ q.mT @ q).transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_from_whose_size_the_code_takes_a_number_is_kept(dtype):
    groups = find_groups(Counting().to(dtype).eval(), EXAMPLE.to(dtype))
    assert [group.name for group in groups] == ["stem"]
    assert {kept.layer: kept.reason for kept in groups.kept}["scaled"] == CHANGES


def test_a_group_that_an_unsound_rule_lets_go_is_kept(monkeypatch):
    monkeypatch.setitem(RULES, "softmax", keeps_zero)
    groups = find_groups(Softmax().eval(), torch.zeros_like(EXAMPLE))
    assert [group.name for group in groups] == ["stem"]
    assert {kept.layer: kept.reason for kept in groups.kept}["mix"] == CHANGES


def test_layers_whose_heads_one_number_counts_lose_the_same_ones():
    groups = find_groups(Quoting().eval(), torch.randn(2, 6, 2, 2))
    assert [(group.layers, group.size) for group in groups] == [(("left.q", "right.q"), 8)]


def test_rounding_is_told_from_a_change_in_double_precision(monkeypatch):
    monkeypatch.setattr("dpm_cli.graph.trial.TOLERANCE", 1e-13)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1)).eval()
    groups = find_groups(model, EXAMPLE)
    alive = np.arange(groups.units) % 2 == 0
    Units(groups, model).scale_(torch.from_numpy(alive).float())
    trial = Trial(model, EXAMPLE, groups, alive)
    assert trial.losing == [0, 1]
    assert trial.difference([0, 1]) < 1e-13
    assert trial.find_culprits() == {}


def test_double_precision_that_would_take_long_is_spared_for_what_may_be_rounding(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    groups = find_groups(model, EXAMPLE)
    alive = np.arange(groups.units) % 2 == 0  # without zeros in the place of those that go: the outputs change
    precisions: list[torch.dtype] = []

    def noting(module, example):
        precisions.append(example.dtype)
        return outputs_of(module, example)

    monkeypatch.setattr("dpm_cli.graph.trial.outputs_of", noting)
    change = Trial(model, EXAMPLE, groups, alive).difference([0])
    for unclear, seen in ((2 * change, [torch.float32] * 2), (change / 2, [torch.float32] * 2 + [torch.float64] * 2)):
        monkeypatch.setattr("dpm_cli.graph.trial.UNCLEAR", unclear)
        precisions.clear()
        assert Trial(model, EXAMPLE, groups, alive, is_dear=True).is_exact([0]) == (unclear > change)
        assert precisions == seen
    assert not Trial(model, EXAMPLE, groups, alive).is_exact([0])


def test_a_trial_changes_nothing_in_the_model():
    model = Counting().train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_groups(model, EXAMPLE)
    assert model.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_untrained_norms_and_zero_inputs_hide_nothing():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 64, 3)).eval()
    for parameter in model[0].parameters():
        nn.init.zeros_(parameter)
    groups = find_groups(model, EXAMPLE)
    trial = make_lively(model, torch.zeros_like(EXAMPLE), groups, np.ones(groups.units, bool))
    assert trial is not None
    assert all(float(output.std()) > 0.01 for output in trial.before)


def test_a_plan_that_breaks_the_training_is_cut_down():
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            assert gradient.shape[1] in (6, 8)
            return gradient

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mix, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 2, 1)

        def forward(self, x):
            return self.head(self.mix(Backward.apply(self.stem(x)).relu()).relu())

    model = Net().eval()
    groups = find_groups(model, EXAMPLE)
    assert [group.size for group in groups] == [8, 12]
    for left, names in ((6, ["stem", "mix"]), (5, ["mix"])):
        alive = np.ones(20, bool)
        alive[left:8] = alive[15:] = False
        assert [group.name for group in rehearse_survivors(model, EXAMPLE, groups, alive)] == names


def test_few_tries_find_those_that_break_alone_and_together():
    tries = []

    def survives(chosen):
        tries.append(chosen)
        return not {3, 77} & set(chosen) and not {5, 60} <= set(chosen)

    assert find_broken(survives, range(100)) == [3, 60, 77]
    assert len(tries) < 60


def test_what_repeats_and_breaks_everywhere_is_found_in_few_tries():
    tries = []

    def survives(chosen):
        tries.append(chosen)
        return all(i % 4 != 1 for i in chosen) and not {2, 7} <= set(chosen)

    assert find_broken(survives, range(100), kinds=[i % 4 for i in range(100)]) == sorted([7, *range(1, 100, 4)])
    assert len(tries) < 32


def test_suspects_find_the_few_of_a_kind_that_break_in_few_tries():
    broken, tries = {12, 40, 77}, []

    def survives(chosen):
        tries.append(set(chosen))
        return not broken & tries[-1]

    kinds = [i // 10 > 0 for i in range(100)]  # ten of one, ninety of another
    assert find_broken(survives, range(100), kinds=kinds, suspects=lambda: {min(broken & tries[-1])}) == [12, 40, 77]
    assert len(tries) < 13
    named_wrongly = find_broken(survives, range(100), kinds=kinds, suspects=lambda: {min(broken & tries[-1]) - 1})
    assert named_wrongly == [12, 40, 77]


def test_no_change_hides_behind_a_rectifier():
    groups = trace_groups(Counting().eval(), EXAMPLE)
    for seed in range(20):
        torch.manual_seed(seed)
        assert len(rehearse_values(Counting().eval(), EXAMPLE, groups)) == 1


def test_a_reason_costs_the_macs_of_the_layers_that_it_keeps():
    groups = find_groups(Counting().eval(), EXAMPLE)
    assert sum(groups.layer_macs.values()) == groups.cost.macs(np.ones(groups.units, bool))
    assert groups.macs_kept() == {CHANGES: 36 * 8 * 8, "output of the model": 36 * 8 * 4}


class ReadByItsParent(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu().mean((2, 3))
        return self.head(nn.functional.linear(x, self.mix.weight, self.mix.bias).softmax(1))


def test_the_layer_that_holds_a_weight_bears_its_cost():
    groups = trace_groups(ReadByItsParent(), EXAMPLE)
    assert groups.layer_macs == {"stem": 36 * 27 * 8, "mix": 64, "head": 32}
    assert groups.macs_kept() == {"softmax over this axis": 64, "output of the model": 32}

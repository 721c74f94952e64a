"""Python code around the operators: numbers in it that break, how little a group may shrink to, odd tensors."""

import numpy as np
import torch
from exactness import assert_removable, randomise_
from torch import nn

import dpm_cli.graph.rehearsal as rehearsal
from dpm_cli.budget import find_floors
from dpm_cli.graph import find_groups

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Squeezed(nn.Module):
    """`squeeze()` takes the channel axis too, once one channel is left."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3), keepdim=True).squeeze())


class HardCoded(nn.Module):
    """Two of its widths stand in the code as numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in ((3, 8), (8, 12), (12, 16), (16, 4)))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x).relu()
            if i in (0, 2):
                assert x.shape[1] == (8, 0, 16)[i], "not what I was built with"
        return x.mean((2, 3))


class WithTensorOfItsOwn(nn.Module):
    """A plain tensor attribute is neither parameter nor buffer: it stays on its device."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.scale = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), torch.rand(1, 1, 6, 6) + 1

    def forward(self, x):
        return self.head((self.stem(x) * self.scale).relu())


def test_a_group_keeps_as_many_units_as_the_code_needs():
    model = Squeezed().eval()
    groups = find_groups(model, EXAMPLE)
    assert [(group.name, group.size, group.least) for group in groups] == [("stem", 8, 2)]
    assert find_floors(groups, round_to=1, min_keep=0).units.tolist() == [2]
    randomise_(model, EXAMPLE)
    assert_removable(model, EXAMPLE, groups, np.arange(8) < 3)


def test_widths_that_stand_in_the_code_are_kept_and_the_rest_is_pruned():
    groups = find_groups(HardCoded().eval(), EXAMPLE)
    assert [group.name for group in groups] == ["layers.1"]
    assert {kept.layer for kept in groups.kept if kept.reason == rehearsal.BREAKS} == {"layers.0", "layers.2"}


def test_broken_groups_are_found_alone_and_together():
    def survives(chosen):
        return 3 not in chosen and not {5, 6} <= set(chosen)

    assert rehearsal._find_broken(survives, range(9)) == [3, 6]
    assert rehearsal._find_broken(survives, [0, 1]) == []


def test_a_model_with_a_tensor_of_its_own_is_rehearsed_beside_it():
    model = WithTensorOfItsOwn().eval()
    randomise_(model, EXAMPLE)
    groups = find_groups(model, EXAMPLE)
    assert [group.name for group in groups] == ["stem"]
    assert_removable(model, EXAMPLE, groups, np.arange(8) < 3)


def test_rehearsing_leaves_the_model_alone():
    model = HardCoded().train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_groups(model, EXAMPLE)
    assert model.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())

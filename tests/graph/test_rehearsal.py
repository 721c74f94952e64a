"""Python code around the operators: numbers in it that break, how little a group may shrink to, odd tensors."""

import numpy as np
import pytest
import torch
from exactness import assert_removable, randomise_
from torch import nn

from dpm_cli.errors import UnsupportedModelError
from dpm_cli.graph import Units, compact_, find_groups
from dpm_cli.graph.analysis import trace_groups
from dpm_cli.graph.copies import Rehearsal
from dpm_cli.graph.search import find_broken
from dpm_cli.graph.trial import BREAKS
from dpm_cli.method.budget import find_width_limits

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Squeezed(nn.Module):
    """`squeeze()` takes the channel axis too, once one channel is left."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3), keepdim=True).squeeze())


class HardCoded(nn.Module):
    """Its code holds two of its widths as numbers."""

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
    assert find_width_limits(groups, round_to=1, min_keep=0).least.tolist() == [2]
    randomise_(model, EXAMPLE)
    assert_removable(model, EXAMPLE, groups, np.arange(8) < 3)


def test_widths_that_stand_in_the_code_are_kept_and_the_rest_is_pruned():
    groups = find_groups(HardCoded().eval(), EXAMPLE)
    assert [group.name for group in groups] == ["layers.1"]
    assert {kept.layer for kept in groups.kept if kept.reason == BREAKS} == {"layers.0", "layers.2"}


def test_broken_groups_are_found_alone_and_together():
    def survives(chosen):
        return 3 not in chosen and not {5, 6} <= set(chosen)

    assert find_broken(survives, range(9)) == [3, 6]
    assert find_broken(survives, [0, 1]) == []


def test_suspects_save_most_of_the_search():
    broken, tries = {3, 40, 77}, []

    def survives(chosen):
        tries.append(set(chosen))
        return not broken & tries[-1]

    def suspects():
        culprit = min(broken & tries[-1])
        return {culprit, culprit + 1, culprit + 2}  # two of three are innocent

    assert find_broken(survives, range(100), suspects=suspects) == [3, 40, 77]
    assert len(tries) < 25
    assert find_broken(survives, range(100), suspects=set) == [3, 40, 77]  # a failure that names nothing


class FixedInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x):
        x = self.inner(x)
        assert x.shape[1] == 12
        return self.outer(x)


def test_the_layer_that_raised_names_its_groups():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), FixedInside(), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 1)).eval()
    groups = trace_groups(model, EXAMPLE)
    assert [group.name for group in groups] == ["0", "1.inner", "1.outer", "2"]
    rehearsal = Rehearsal(model, EXAMPLE, groups.outputs)
    assert not rehearsal.survives(groups, {1: 5, 3: 2})
    assert rehearsal.suspects(groups) == {0, 1, 2}
    assert rehearsal.survives(groups, {0: 5, 2: 4, 3: 2})
    assert rehearsal.suspects(groups) == set()
    model[1].forward = None  # would raise another error elsewhere: what has failed is not tried again
    assert not rehearsal.survives(groups, {1: 5, 3: 2})
    assert rehearsal.suspects(groups) == {0, 1, 2}
    del model[1].forward
    assert [group.name for group in find_groups(model, EXAMPLE)] == ["0", "1.outer", "2"]


class Pair(nn.Module):
    """Takes a list of pictures; its second layer gets its width from the first input."""

    def __init__(self):
        super().__init__()
        self.stem, self.lazy, self.head = nn.Conv2d(3, 8, 3), nn.LazyLinear(10), nn.Linear(10, 4)

    def forward(self, pictures):
        x = torch.stack([self.stem(picture[None])[0] for picture in pictures]).relu().mean((2, 3))
        return self.head(self.lazy(x).relu())


def test_a_list_of_pictures_and_a_lazy_layer():
    pictures = ([EXAMPLE[0], EXAMPLE[1], EXAMPLE[0] + 1],)
    model = Pair().eval()
    groups = find_groups(model, pictures)
    assert [(group.name, group.size) for group in groups] == [("stem", 8), ("lazy", 10)]
    assert groups.cost.batch == 3
    assert groups.cost.macs(np.ones(groups.units, bool)) == 36 * 27 * 8 + 80 + 40
    alive = np.arange(groups.units) % 2 == 0
    Units(groups, model).scale_(torch.from_numpy(alive).float())
    with torch.no_grad():
        before = model(*pictures)
        compact_(model, groups, alive)
        torch.testing.assert_close(model(*pictures), before)


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


class Res2(nn.Module):
    """An attribute holds the width of each part; a list holds the widths of unequal parts."""

    def __init__(self):
        super().__init__()
        self.width, self.parts = 4, [4, 8]
        self.stem, self.own = nn.Conv2d(3, 12, 1), nn.Conv2d(4, 4, 1)
        self.wide, self.left, self.right = nn.Conv2d(12, 12, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(10, 5, 1)

    def forward(self, x):
        first, *rest = torch.split(self.stem(x).relu(), self.width, 1)
        x = self.wide(torch.cat([self.own(first).relu(), *rest], 1)).relu()
        left, right = x.split(self.parts, 1)
        return self.head(torch.cat([self.left(left), self.right(right)], 1).relu())


def test_numbers_of_parts_follow_what_is_removed():
    model = Res2().eval()
    randomise_(model, EXAMPLE)
    groups = find_groups(model, EXAMPLE)
    sizes = [(group.name, group.size) for group in groups]
    assert sizes == [("stem", 4), ("own", 4), ("wide", 4), ("wide", 8), ("left", 4), ("right", 6)]
    alive = np.ones(groups.units, bool)
    alive[[group.start for group in groups]] = False
    assert_removable(model, EXAMPLE, groups, alive)
    assert model.width == 3
    assert model.parts == [3, 7]


class Positions(nn.Module):
    """Adds a map that the code makes for every input, through a convolution of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.place, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(1, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        ramp = torch.ones(len(x), 1, 8, 8).cumsum(3)
        return self.head((self.stem(x) + self.place(ramp)).relu())


def test_what_the_code_makes_for_every_input_is_counted_once_per_input():
    model = Positions().eval()
    groups = find_groups(model, EXAMPLE)
    assert groups.cost.macs(np.ones(groups.units, bool)) == 64 * (3 * 6 + 6 + 6 * 2)


class MakesItsBuffer(nn.Module):
    """The buffer has its size from the first forward on: of a row of places, or of the channels."""

    def __init__(self, axis):
        super().__init__()
        self.axis, self.stem, self.head = axis, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.register_buffer("table", torch.zeros(0))

    def forward(self, x):
        x = self.stem(x).relu()
        if len(self.table) != x.shape[self.axis]:
            self.table = torch.linspace(0.5, 1, x.shape[self.axis])
        return self.head((x.movedim(self.axis, -1) * self.table).movedim(-1, self.axis)).mean((2, 3))


@pytest.mark.parametrize("axis", [1, 3])
def test_a_buffer_made_in_the_first_forward_is_there_when_the_graph_is_read(axis):
    model = MakesItsBuffer(axis).eval()
    groups = find_groups(model, EXAMPLE)
    assert [group.name for group in groups] == ["stem"]
    assert model.table.isfinite().all()
    randomise_(model, EXAMPLE)
    assert_removable(model, EXAMPLE, groups, np.arange(8) < 3)


class Deciding(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_exported_is_refused_in_one_line_that_names_the_layer(capfd):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), Deciding()))
    with pytest.raises(UnsupportedModelError, match=r": 1\.1: its code decides by the values of a tensor") as error:
        find_groups(model, EXAMPLE)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


class Encoder(nn.Module):
    """As many tokens as channels, as many heads as head dimensions: sizes alone tell nothing apart."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0)
        self.stem, self.encoder = nn.Conv2d(3, 16, 2, 2), nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.encoder(self.stem(x).flatten(2).mT).mean(1)


def test_encoder_layers_lose_heads_in_eval_mode_too():
    """Their fast path reads the weights of the attention without calling it."""
    model = Encoder().eval()
    randomise_(model, EXAMPLE)
    groups = find_groups(model, EXAMPLE)
    assert [group.size for group in groups] == [4, 24] * 2
    alive = np.arange(groups.units) % 2 == 0
    Units(groups, model).scale_(torch.from_numpy(alive).float())
    with torch.no_grad():
        before = model(EXAMPLE)
        compact_(model, groups, alive)
        torch.testing.assert_close(model(EXAMPLE), before, rtol=1e-5, atol=1e-5)

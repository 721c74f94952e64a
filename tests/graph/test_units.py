"""The vectorised reductions against one unit at a time."""

import numpy as np
import pytest
import torch
from exactness import cast, randomise_
from topologies import TOPOLOGIES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpm_cli.graph import Role, Units, compact_, find_groups
from dpm_cli.graph.units import CACHED

NAMES = ("ResidualChain", "GroupedConv", "ConvTranspose", "FlattenToLinear", "BareScaleAndBias", "ThreeDimensions")


@pytest.fixture(params=NAMES, scope="module")
def bound(request):
    case = TOPOLOGIES[request.param]
    torch.manual_seed(0)
    model = case.build().double()
    randomise_(model, cast(case.example, torch.float64))
    return find_groups(model, cast(case.example, torch.float64)), model


def entries_of(groups, model, unit, tensors=None):
    """All producer-side entries of one unit, parameter by parameter, index by index."""
    entries = []
    for part in groups.slices:
        if part.role in (Role.PRODUCER, Role.NORM, Role.BIAS):
            tensor = model.get_parameter(part.tensor).detach() if tensors is None else tensors[part.tensor]
            entries += [tensor.select(part.axis, i).flatten() for i in np.flatnonzero(part.units == unit).tolist()]
    return torch.cat(entries)


def test_norms_are_those_of_each_units_entries(bound):
    groups, model = bound
    norms = Units(groups, model).norm()
    assert norms.tolist() == pytest.approx([entries_of(groups, model, u).norm().item() for u in range(groups.units)])


def test_norms_of_other_tensors_of_the_same_shapes(bound):
    groups, model = bound
    units = Units(groups, model)
    twice = units.norm([2 * weight for weight in units.weights()])
    torch.testing.assert_close(twice, 2 * units.norm())


def test_inner_products_are_those_of_each_units_entries(bound):
    groups, model = bound
    units = Units(groups, model)
    other = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    products = units.dot(units.weights(), [other[name] for name in units.names])
    expected = [
        torch.dot(entries_of(groups, model, u), entries_of(groups, model, u, other)).item() for u in range(groups.units)
    ]
    assert products.tolist() == pytest.approx(expected)


def test_a_comparison_gives_norms_and_inner_products(bound):
    groups, model = bound
    units = Units(groups, model)
    other = [torch.randn_like(parameter) for parameter in units.parameters]
    norms, products = units.compare(units.weights(), other)
    torch.testing.assert_close(norms, units.norm())
    torch.testing.assert_close(products, units.total([a * b for a, b in zip(units.weights(), other)]))


def test_large_tensors_in_parts_and_layouts_give_the_same():
    """A layer of several parts beside small ones; the gradient's layout is not the weight's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Conv2d(512, 64, 3), nn.ReLU(), nn.Conv2d(64, 2, 1))
    groups = find_groups(model, torch.zeros(2, 3, 8, 8))
    units = Units(groups, model)
    assert max(parameter.numel() for parameter in units.parameters) > CACHED
    other = [torch.randn_like(parameter) for parameter in units.parameters]
    contiguous = units.compare(units.weights(), other)
    model.to(memory_format=torch.channels_last)
    for mixed, expected in zip(units.compare(units.weights(), other), contiguous):
        torch.testing.assert_close(mixed, expected)
    by_hand = [entries_of(groups, model, unit).norm() for unit in range(groups.units)]
    torch.testing.assert_close(contiguous[0], torch.stack(by_hand))


def test_entries_are_counted(bound):
    groups, model = bound
    expected = [entries_of(groups, model, u).numel() for u in range(groups.units)]
    assert Units(groups, model).entries().tolist() == expected


def test_scaling_reaches_every_entry_of_a_unit_once_and_nothing_else(bound):
    groups, model = bound
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    factor = torch.linspace(0.25, 4, groups.units, dtype=torch.float64)
    units = Units(groups, model)
    units.scale_(factor)
    for unit in range(groups.units):
        torch.testing.assert_close(
            entries_of(groups, model, unit), factor[unit] * entries_of(groups, model, unit, before)
        )
    for name, parameter in model.named_parameters():
        if name not in units.names:
            assert torch.equal(parameter, before[name])
    units.scale_(1 / factor)


def test_scaling_by_one_leaves_every_bit_alone(bound):
    groups, model = bound
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Units(groups, model).scale_(torch.ones(groups.units))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.int64), before[name].view(torch.int64))


def test_a_gradient_that_is_missing_counts_as_zero(bound):
    groups, model = bound
    units = Units(groups, model)
    for parameter in model.parameters():
        parameter.grad = None
    assert not units.dot(units.gradients(), units.weights()).any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_joined_kernels_compute_what_single_ones_do(layout):
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), *layers, nn.ConvTranspose2d(6, 4, 2), nn.Flatten(), nn.Linear(324, 2))
    groups = find_groups(model, torch.zeros(2, 3, 8, 8))
    model.to(memory_format=layout)
    single, joined = Units(groups, model, joined=False), Units(groups, model, joined=True)
    others = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    mine, theirs = ([others[name] for name in units.names] for units in (joined, single))
    for got, expected in zip(joined.compare(joined.weights(), mine), single.compare(single.weights(), theirs)):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(joined.norm(), single.norm())
    torch.testing.assert_close(joined.total(mine), single.total(theirs))
    factor = torch.rand(groups.units).masked_fill_(torch.arange(groups.units) % 3 == 0, 0)
    before = [parameter.detach().clone() for parameter in single.parameters]
    single.add_(theirs, factor)
    single.scale_(factor)
    expected = {name: p.detach().clone() for name, p in zip(single.names, single.parameters)}
    for parameter, was in zip(single.parameters, before):
        parameter.data.copy_(was)
    for _ in range(2):  # what is kept between calls is filled anew
        for parameter, was in zip(single.parameters, before):
            parameter.data.copy_(was)
        joined.add_(mine, factor)
        joined.scale_(factor)
    for name, parameter in zip(joined.names, joined.parameters):
        assert torch.equal(parameter, expected[name])


class Calls(TorchDispatchMode):
    """Counts operators; one for many tensors counts once, as on a GPU if these agree in shape and strides."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not operator.is_view
        if operator is torch.ops.aten._foreach_mul_.List:
            shares = [(p.shape, p.stride()) == (factor.shape, factor.stride()) for p, factor in zip(*args)]
            self.count += 0 if all(shares) else len(shares)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_joined_kernels_do_not_grow_with_the_depth(layout):
    calls = {}
    for depth in (2, 12):
        layers = [layer for _ in range(depth) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))]
        model = nn.Sequential(nn.Conv2d(3, 4, 1), *layers, nn.Flatten(), nn.Linear(64, 2))
        groups = find_groups(model, torch.zeros(2, 3, 4, 4))
        model.to(memory_format=layout)
        for joined in (False, True):
            units = Units(groups, model, joined=joined)
            units.scale_(torch.ones(groups.units))  # the first one makes room
            with Calls() as counter:
                units.compare(units.weights(), units.weights())
                units.norm()
                units.scale_(torch.ones(groups.units))
            calls[joined, depth] = counter.count
    assert calls[True, 12] == calls[True, 2]
    assert calls[True, 12] < 40 < calls[False, 12]


class ReadsConstants(nn.Module):
    """The middle weight makes units along its rows, and reads what a sigmoid leaves behind along its columns."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.mid(self.stem(x).sigmoid()).sigmoid())


@pytest.mark.parametrize("joined", [False, True])
def test_weights_that_shrink_along_two_axes_are_scaled_along_both(joined):
    model = ReadsConstants().double()
    groups = find_groups(model, torch.randn(2, 3, dtype=torch.float64))
    assert [(part.tensor, part.axis) for part in groups.slices if part.role is Role.READER] == [
        ("mid.weight", 1),
        ("head.weight", 1),
    ]
    units, before = Units(groups, model, joined=joined), model.mid.weight.detach().clone()
    rows = torch.stack([model.mid.bias.square() + before.square().sum(1) + model.head.weight.square().sum(0)])
    torch.testing.assert_close(units.norm()[5:], rows[0].sqrt())
    added = [torch.ones_like(parameter) for parameter in units.parameters]
    stem, mid = torch.rand(5, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    units.scale_(torch.cat([stem, mid]))
    torch.testing.assert_close(model.mid.weight.detach(), before * mid[:, None] * stem)
    before = model.mid.weight.detach().clone()
    units.add_(added, torch.cat([stem, mid]))
    torch.testing.assert_close(model.mid.weight.detach(), before + mid[:, None] + stem)


def test_a_spectral_norm_keeps_its_vectors_when_a_model_in_train_mode_is_cut():
    spectral_norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), spectral_norm(nn.Conv2d(8, 6, 3)))
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    groups = find_groups(model.eval(), images)
    alive = np.arange(groups.units) % 2 == 0
    Units(groups, model).scale_(torch.from_numpy(alive).float())
    before, vector = model(images), model[2].parametrizations.weight[0]._v.clone()
    compact_(model.train(), groups, alive)
    assert model.training
    assert torch.equal(model[2].parametrizations.weight[0]._v, vector.view(8, 9)[alive].flatten())
    assert torch.allclose(model.eval()(images), before, atol=1e-6)

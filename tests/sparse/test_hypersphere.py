import copy

import pytest
import torch
from torch import nn

from dpm_cli.sparse.hypersphere import normalise, put_on_sphere_, take_off_sphere_, trained_weight


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 36, 4)).eval()


IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("per", ["filter", "layer"])
def test_a_trained_model_computes_the_same_on_the_sphere_and_off_it(per):
    net = make()
    dense, names = net(IMAGES), list(net.state_dict())
    put_on_sphere_(net, ["0", "3"], per)
    on_sphere = net(IMAGES)
    assert torch.allclose(on_sphere, dense, atol=1e-5)
    take_off_sphere_(net, ["0", "3"])
    assert torch.equal(net(IMAGES), on_sphere)
    assert type(net[0]) is nn.Conv2d
    assert sorted(net.state_dict()) == sorted(names)


@pytest.mark.parametrize("factor", [1e-3, 0.5, 7.0])
@pytest.mark.parametrize("per", ["filter", "layer"])
def test_the_length_of_a_weight_changes_nothing(per, factor):
    net = make()
    put_on_sphere_(net, ["0"], per)
    before = net(IMAGES)
    with torch.no_grad():
        trained_weight(net[0]).mul_(factor)
    assert torch.allclose(net(IMAGES), before, atol=1e-5)


def test_each_filter_has_a_length_of_its_own():
    net = make()
    put_on_sphere_(net, ["0"], "filter")
    before = net(IMAGES)
    with torch.no_grad():
        trained_weight(net[0]).mul_(torch.rand(6, 1, 1, 1) + 0.1)
    assert torch.allclose(net(IMAGES), before, atol=1e-5)


def test_training_keeps_every_filter_on_its_sphere():
    net = make().train()
    radii = net[0].weight.detach().flatten(1).norm(dim=1)
    put_on_sphere_(net, ["0"], "filter")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    start = copy.deepcopy(net[0].weight.detach())
    for _ in range(3):
        optimizer.zero_grad()
        net(IMAGES).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(net[0].weight, start)
    assert torch.allclose(net[0].weight.detach().flatten(1).norm(dim=1), radii)


def test_a_filter_of_zeros_stays_zero():
    weight = torch.randn(3, 4)
    weight[1] = 0
    assert torch.equal(normalise(weight, "filter")[1], torch.zeros(4))
    assert normalise(weight, "filter").isfinite().all()

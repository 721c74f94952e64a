import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpm_cli.graph import Units, compact_, find_groups
from dpm_cli.graph.folding import find_shifts, fold_means_, give_biases_, measure_lost
from dpm_cli.models import build
from tests.graph.exactness import randomise_

EXAMPLE = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """A stem whose units a conv reads; behind that a BatchNorm, or nothing."""

    def __init__(self, *, padding: int = 0, bias: bool = False, norm: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 6, 3, padding=padding, bias=bias, groups=groups)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.body(F.relu(self.stem(x)))).mean((2, 3)))


def make(**settings):
    torch.manual_seed(0)
    net = Net(**settings)
    randomise_(net, torch.randn(2, 3, 8, 8))
    return net


def images(seed=1, batches=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(batches)]


def victims_of(groups, name, count):
    alive = np.ones(groups.units, bool)
    group = next(group for group in groups if group.name == name)
    alive[group.start : group.start + count] = False
    return alive


def cut(net, alive, *, fold):
    """A copy without these units, with or without their means."""
    net = copy.deepcopy(net)
    shifts = find_shifts(net, EXAMPLE)
    if fold:
        give_biases_(net, find_groups(net, EXAMPLE), shifts)
    groups = find_groups(net, EXAMPLE)
    if fold:
        assert fold_means_(net, groups, alive, images(), shifts) == []
    Units(groups, net).scale_(torch.from_numpy(alive).float())
    compact_(net, groups, alive)
    return net


PLACES = [
    pytest.param({"norm": True}, "norm.running_mean", id="batchnorm"),
    pytest.param({"norm": False, "bias": True}, "body.bias", id="bias"),
    pytest.param({"norm": True, "bias": True}, "body.bias", id="bias before batchnorm"),
    pytest.param({"norm": False}, "body.bias", id="new bias"),
    pytest.param({"norm": True, "groups": 2}, "norm.running_mean", id="grouped"),
]


@pytest.mark.parametrize(("settings", "place"), PLACES)
@pytest.mark.every(3)
def test_constant_channels_are_folded_exactly(settings, place):
    net = make(**settings)
    assert find_shifts(net, EXAMPLE)["body"] == place
    alive = victims_of(find_groups(net, EXAMPLE), "stem", 2)
    dead = np.flatnonzero(~np.concatenate([alive[:4]] * 2 if settings.get("groups") else [alive[:8]]))
    with torch.no_grad():
        net.stem.weight[dead] = 0  # so these channels are their bias everywhere
        net.stem.bias[dead] = torch.linspace(0.5, 1.5, len(dead))
        (batch,) = images(seed=5, batches=1)
        before = net(batch)
        assert torch.allclose(cut(net, alive, fold=True)(batch), before, atol=1e-5)
        assert not torch.allclose(cut(net, alive, fold=False)(batch), before, atol=1e-2)


def body_outputs(net, batches):
    seen = []
    (net.norm if isinstance(net.norm, nn.BatchNorm2d) else net.body).register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    with torch.no_grad():
        for batch in batches:
            net(batch)
    return torch.cat(seen)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("settings", "place"), PLACES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.every(8)
def test_folding_never_increases_the_error_of_the_layers_that_read(settings, place, padding, count):
    net = make(padding=padding, **settings)
    alive = victims_of(find_groups(net, EXAMPLE), "stem", count)
    dense = body_outputs(copy.deepcopy(net), images())
    errors = [
        (body_outputs(cut(net, alive, fold=fold), images()) - dense).square().sum((0, 2, 3)) for fold in (False, True)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < errors[0].sum()


def test_what_is_lost_is_the_mean_of_the_dead_inputs_through_their_weights():
    net = make()
    groups = find_groups(net, EXAMPLE)
    alive = victims_of(groups, "stem", 3)
    lost = measure_lost(net, groups, alive, images())["body"]
    with torch.no_grad():
        read = F.relu(net.stem(torch.cat(images())))[:, :3]
        expected = F.conv2d(read, net.body.weight[:, :3]).mean((0, 2, 3))
    assert torch.allclose(lost.float(), expected, atol=1e-5)


def test_measuring_changes_nothing_and_leaves_no_hook():
    net = make().train()
    before = copy.deepcopy(net.state_dict())
    groups = find_groups(net, EXAMPLE)
    measure_lost(net, groups, victims_of(groups, "stem", 3), images())
    assert net.training
    assert not net.body._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.thorough
def test_every_reader_of_a_residual_stream_takes_its_share():
    torch.manual_seed(0)
    net = build("resnet20", classes=10, shape=(3, 8, 8))
    randomise_(net, torch.randn(2, 3, 8, 8))
    shifts = find_shifts(net, EXAMPLE)
    assert shifts["layer1.0.conv1"] == "layer1.0.bn1.running_mean"
    assert shifts["layer2.0.shortcut.0"] == "layer2.0.shortcut.1.running_mean"
    assert shifts["linear"] == "linear.bias"
    groups = find_groups(net, EXAMPLE)
    assert give_biases_(net, groups, shifts) == []
    alive = victims_of(groups, "conv1", 4)
    assert measure_lost(net, groups, alive, images()).keys() == {
        "layer1.0.conv1", "layer1.1.conv1", "layer1.2.conv1", "layer2.0.conv1", "layer2.0.shortcut.0",
    }  # fmt: skip


def test_a_batchnorm_that_something_else_reads_past_does_not_take_the_constant():
    class Past(Net):
        def forward(self, x):
            y = self.body(F.relu(self.stem(x)))
            return self.head((self.norm(y) + y).mean((2, 3)))

    torch.manual_seed(0)
    assert find_shifts(Past().eval(), EXAMPLE)["body"] == "body.bias"


def test_weights_that_are_used_without_calling_their_layer_are_told():
    class Functional(Net):
        def forward(self, x):
            y = F.conv2d(F.relu(self.stem(x)), self.body.weight)
            return self.head(self.norm(y).mean((2, 3)))

    torch.manual_seed(0)
    net = Functional().eval()
    groups = find_groups(net, EXAMPLE)
    shifts = find_shifts(net, EXAMPLE)
    assert fold_means_(net, groups, victims_of(groups, "stem", 2), images(), shifts) == ["body"]

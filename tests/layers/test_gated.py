import copy

import pytest
import torch
from torch import nn

from dpm_cli.layers.gated import Gated, add_gates_, can_be_gated, merge_gates_


def make_norm(kind=nn.BatchNorm2d, **settings):
    """Shifts of zero to a hundred times the scale, scales that are negative or zero."""
    norm = kind(7, **settings).double()
    norm.weight.data = torch.tensor([1.5, -0.8, 0.3, -1e-3, 0.0, 0.0, 2.0], dtype=torch.float64)
    norm.bias.data = torch.tensor([0.7, 2.0, -3.0, 0.1, 0.4, 0.0, 0.0], dtype=torch.float64)
    return norm


@pytest.mark.parametrize(("kind", "shape"), [
    (nn.BatchNorm1d, (9, 7)), (nn.BatchNorm1d, (9, 7, 5)), (nn.BatchNorm2d, (9, 7, 3, 3)),
    (nn.BatchNorm3d, (4, 7, 2, 3, 3)),
])  # fmt: skip
@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1}])
def test_gated_norm_computes_what_the_norm_did_whatever_its_shift_and_scale(kind, shape, settings):
    norm, generator = make_norm(kind, **settings), torch.Generator().manual_seed(0)
    model = nn.Sequential(copy.deepcopy(norm))
    assert add_gates_(model) == ["0"]
    gated = model[0]
    assert isinstance(gated, Gated)
    assert add_gates_(model) == []  # not twice
    for training in (True, True, False):
        norm.train(training)
        model.train(training)
        x = 2 + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(model(x), norm(x), rtol=1e-12, atol=1e-12)
    assert (gated.weight[:5] != 0).all()  # whatever is not zero has a gate that can decay
    assert gated.bias.abs().max() <= 10 + 1e-9
    merge_gates_(model)
    assert type(gated) is kind
    assert gated.state_dict().keys() == norm.state_dict().keys()
    for name, tensor in norm.state_dict().items():
        torch.testing.assert_close(gated.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x), norm(x), rtol=1e-12, atol=1e-12)


def test_merged_norm_computes_what_the_trained_gate_did():
    model = nn.Sequential(make_norm())
    add_gates_(model)
    x = torch.randn(9, 7, 3, 3, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        model[0].weight.mul_(torch.linspace(0, 2, 7))
        model[0].bias.add_(0.3)
    expected = model.eval()(x)
    merge_gates_(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert not expected[:, 0].any()  # a gate of zero leaves nothing of its channel


def test_only_trainable_affine_norms_are_gated():
    frozen = nn.BatchNorm2d(3)
    frozen.weight.requires_grad_(False)
    norms = [frozen, nn.BatchNorm2d(3, affine=False), nn.GroupNorm(1, 3), nn.SyncBatchNorm(3), nn.BatchNorm2d(3)]
    assert [can_be_gated(norm) for norm in norms] == [False, False, False, False, True]
    assert add_gates_(nn.Sequential(*norms)) == ["4"]


def test_norm_that_is_used_twice_gets_one_gate():
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert add_gates_(model) == ["0"]
    merge_gates_(model)
    assert type(model[2]) is nn.BatchNorm2d

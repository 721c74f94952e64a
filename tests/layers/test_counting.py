"""Layers that have lost channels give what they gave when these were zero."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dpm_cli.layers.attention import fit_slim_class_
from dpm_cli.layers.counting import SlimCounting, counting_form, note_count_

timm_layers = pytest.importorskip("timm.layers")
LEFT = torch.tensor([0, 3, 4])


def response_norm() -> nn.Module:
    from timm.layers.grn import GlobalResponseNorm

    return GlobalResponseNorm(6)


def response_norm_of_channels_first() -> nn.Module:
    from timm.layers.grn import GlobalResponseNorm

    return GlobalResponseNorm(6, channels_last=False)


def response_norm_of_transformers() -> nn.Module:
    return pytest.importorskip("transformers.models.convnextv2.modeling_convnextv2").ConvNextV2GRN(6)


NORMS = [response_norm, response_norm_of_channels_first]
NORMS.append(pytest.param(response_norm_of_transformers, marks=pytest.mark.thorough))  # slow to import
CONVS = ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"]


def randomised(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double()


def lose_(layer: nn.Module, name: str, axis: int, left: Tensor) -> None:
    weight = getattr(layer, name)
    setattr(layer, name, nn.Parameter(weight.index_select(axis, left)))


@pytest.mark.parametrize("make", NORMS)
def test_a_response_norm_counts_lost_channels_as_zeros(make):
    dense = randomised(make())
    channels = getattr(dense, "channel_dim", -1)
    x = torch.randn(2, 6, 6, 6, dtype=torch.float64)
    dead = torch.ones(6, dtype=torch.bool).index_fill(0, LEFT, False)
    x.movedim(channels, 0)[dead] = 0
    with counting_form(dense):
        assert isinstance(dense, SlimCounting)
        counted = dense(x)
    assert not isinstance(dense, SlimCounting)
    assert "counted" not in vars(dense)
    torch.testing.assert_close(counted, dense(x))
    slim = copy.deepcopy(dense)
    note_count_(slim)
    axis = slim.weight.dim() - 1
    lose_(slim, "weight", axis, LEFT)
    lose_(slim, "bias", axis, LEFT)
    assert fit_slim_class_(slim)
    assert isinstance(slim, SlimCounting)
    torch.testing.assert_close(slim(x.index_select(channels, LEFT)), dense(x).index_select(channels, LEFT))


@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 8), (2, 9)])
@pytest.mark.parametrize("name", CONVS)
def test_a_standardised_convolution_counts_lost_columns_as_zeros(name, stride, size):
    dense = randomised(getattr(timm_layers, name)(6, 5, 3, stride=stride))
    x = torch.randn(2, 6, size, size, dtype=torch.float64)
    with counting_form(dense):
        counted = dense(x)
    torch.testing.assert_close(counted, dense(x))
    slim = copy.deepcopy(dense)
    note_count_(slim)
    dead = torch.ones(6, dtype=torch.bool).index_fill(0, LEFT, False)
    with torch.no_grad():
        dense.weight[:, dead] = 0
        x[:, dead] = 0
    lose_(slim, "weight", 1, LEFT)
    fit_slim_class_(slim)
    torch.testing.assert_close(slim(x[:, LEFT]), dense(x))

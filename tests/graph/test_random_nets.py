"""Any composition of blocks, any survivors: exact removal, exact costs, the same answer twice."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_removable, assert_same_structure, randomise_
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from topologies import conv_bn
from torch import Tensor, nn

from dpm_cli.graph import compact_, find_groups

EXAMPLE = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(channels, width), nn.Conv2d(width, channels, 1), nn.BatchNorm2d(channels))
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x), inplace=True)


class Dense(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body, self.channels = conv_bn(channels, width), channels + width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Depthwise(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.deep, self.mix, self.channels = (
            conv_bn(channels, channels, groups=channels),
            conv_bn(channels, width),
            width,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.deep(x))


class Grouped(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter, self.body, self.channels = conv_bn(channels, 8, 1), conv_bn(8, 2 * width, groups=2), 2 * width

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.enter(x))


class Gated(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite, self.channels = (
            nn.Conv2d(channels, width, 1),
            nn.Conv2d(width, channels, 1),
            channels,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Split(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter, self.left, self.right = conv_bn(channels, 2 * width, 1), conv_bn(width, 3), conv_bn(width, width)
        self.channels = 3 + width

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.enter(x).chunk(2, 1)
        return torch.cat([self.right(right), self.left(left)], 1)


class Shuffle(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter, self.channels = conv_bn(channels, 2 * width), 2 * width

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class LayerScaled(nn.Module):
    """A residual branch with a scale per channel and an activation that does not keep zero."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.gamma, self.channels = nn.Parameter(torch.ones(channels, 1, 1)), channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.narrow(self.scale * F.relu(self.widen(x)) ** 2 + self.shift)


class GroupNormed(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = 2 * width
        self.body, self.norm = nn.Conv2d(channels, 2 * width, 3, padding=1), nn.GroupNorm(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.body(x)))


class Attention(nn.Module):
    """Heads over the places of a picture; a part of each head's dimensions is turned by position."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels
        self.qkv, self.proj = nn.Linear(channels, 3 * 4 * heads), nn.Linear(4 * heads, channels)
        self.register_buffer("angles", torch.linspace(0, 3, 36)[:, None] * torch.tensor([1.0, 0.3, 1.0, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        qkv = self.qkv(tokens).reshape(x.shape[0], 36, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
        q, k, v = self.turned(qkv[0]), self.turned(qkv[1]), qkv[2]
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.proj(out).mT.unflatten(2, x.shape[2:])

    def turned(self, x: Tensor) -> Tensor:
        half = torch.cat([-x[..., 2:], x[..., :2]], -1)
        return x * self.angles.cos() + half * self.angles.sin()


class PaddedShortcut(nn.Module):
    """The first channels go on beside others that start as zeros."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body, self.added, self.channels = conv_bn(channels, channels + width), width, channels + width

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, self.added)) + self.body(x)


class OwnResponseNorm(nn.Module):
    """Global response normalisation as users write it: the mean over channels keeps them."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.widen, self.narrow, self.channels = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1), channels
        self.weight, self.bias = nn.Parameter(torch.ones(width, 1, 1)), nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        wide = F.gelu(self.widen(x))
        norms = wide.norm(p=2, dim=(2, 3), keepdim=True)
        return x + self.narrow(wide + self.weight * wide * norms / (norms.mean(1, keepdim=True) + 1e-6) + self.bias)


class SpectralNormed(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm if width % 2 else nn.utils.spectral_norm
        self.enter, self.body = norm(nn.Conv2d(channels, width, 3, padding=1)), norm(nn.Conv2d(width, width, 1))
        self.channels = width

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.leaky_relu(self.enter(x), 0.2))


BLOCKS = [Residual, Dense, Depthwise, Grouped, Gated, Split, Shuffle]
BLOCKS += [LayerScaled, GroupNormed, Attention, PaddedShortcut, OwnResponseNorm, SpectralNormed]
KEEPING = (PaddedShortcut, OwnResponseNorm)


class ResponseNormed(nn.Module):
    """Global response normalisation of timm, which goes on counting what is removed."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.widen, self.narrow, self.channels = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1), channels
        self.norm = GlobalResponseNorm(width, channels_last=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.norm(F.gelu(self.widen(x))))


class Standardised(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        kinds = [timm_layers.StdConv2d, timm_layers.ScaledStdConv2d, timm_layers.ScaledStdConv2dSame]
        self.enter, self.body = kinds[width % 3](channels, width, 1), kinds[channels % 3](width, width, 3)
        self.norm, self.channels = nn.BatchNorm2d(width), width

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.body(torch.sigmoid(self.enter(x)) * self.enter(x))))


try:
    from timm import layers as timm_layers
    from timm.layers.grn import GlobalResponseNorm
except ImportError:  # an extra
    pass
else:
    BLOCKS += [ResponseNormed, Standardised]


class RandomNet(nn.Module):
    def __init__(self, blocks: list[tuple[Any, int]], side: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        layers, channels = [], 4
        for block, width in blocks:
            layers.append(block(channels, width))
            channels = layers[-1].channels
        self.blocks = nn.ModuleList(layers)
        at = side % (len(blocks) + 1)
        self.side, self.at = nn.Conv2d([4, *(layer.channels for layer in layers)][at], channels, 1), at
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.stem(x)]
        for block in self.blocks:
            outputs.append(block(outputs[-1].clone()))
        return self.head((outputs[-1] + self.side(outputs[self.at])).mean((2, 3)))


nets = st.builds(
    RandomNet,
    st.lists(st.tuples(st.sampled_from(BLOCKS), st.integers(4, 6)), min_size=1, max_size=4),
    st.integers(0, 4),
)
few = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # shrinking would export hundreds of nets
)


def draw_survivors(data: st.DataObject, groups: Any) -> np.ndarray:
    """(units,) Anything, but a few of every group stay: a grouped conv with one column looks depthwise."""
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=groups.units, max_size=groups.units)), bool)
    for group in groups:
        alive[group.start : group.start + 3] = True
    return alive


def check_survivors(net: RandomNet, data: st.DataObject) -> None:
    net = net.double()
    randomise_(net, EXAMPLE)
    groups = find_groups(net, EXAMPLE)
    if not any(isinstance(block, KEEPING) for block in net.blocks):
        assert [kept.layer for kept in groups.kept] == ["head"]
    assert groups.units > 0
    assert_removable(net, EXAMPLE, groups, draw_survivors(data, groups))


@few
@given(net=nets, data=st.data())
def test_any_survivors_of_any_net_are_exact_in_outputs_and_cost(net, data):
    check_survivors(net, data)


@settings(few, max_examples=200)
@given(net=nets, data=st.data())
@pytest.mark.slow
def test_any_survivors_of_two_hundred_nets_are_exact_in_outputs_and_cost(net, data):
    check_survivors(net, data)


@few
@given(net=nets)
@pytest.mark.thorough
def test_groups_come_in_the_same_order_twice(net):
    first, second = find_groups(net.double(), EXAMPLE), find_groups(net, EXAMPLE)
    assert_same_structure(first, second)
    assert first.kept == second.kept
    assert [group.start for group in first] == np.cumsum([0, *(group.size for group in first)]).tolist()[:-1]
    positions = {name: i for i, (name, _) in enumerate(net.named_modules())}
    starts = [positions[group.name] for group in first]
    assert len(set(starts)) == len(starts)


@few
@given(net=nets, data=st.data())
@pytest.mark.thorough
def test_removing_in_two_steps_is_removing_at_once(net, data):
    groups = find_groups(net.double(), EXAMPLE)
    first = draw_survivors(data, groups)
    left = groups.survivors(first)
    second = draw_survivors(data, left)
    both = first.copy()
    both[np.flatnonzero(first)[~second]] = False
    weights = net.state_dict()
    compact_(net, groups, first)
    compact_(net, left, second)
    for name, value in net.state_dict().items():
        expected = weights[name]
        for axis, positions in groups.kept_positions(both).get(name, {}).items():
            expected = expected.index_select(axis, torch.from_numpy(positions))
        assert torch.equal(value, expected), name
    assert left.cost.macs(second) == groups.cost.macs(both)
    assert left.cost.parameters(second) == groups.cost.parameters(both)

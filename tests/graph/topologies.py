"""One tiny net per way in which channels can be tied, with what must be found in it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (2, 3, 8, 8)


@dataclass(frozen=True)
class Topology:
    """`groups`: the name and the number of units of every group. `kept`: layer -> part of the reason."""

    build: Callable[[], nn.Module]
    example: Any
    groups: Mapping[str, int]
    kept: Mapping[str, str] = field(default_factory=dict)
    retrace: bool = True  # whether the compacted model gives the same groups when it is traced again


TOPOLOGIES: dict[str, Topology] = {}


def topology(
    *shapes: tuple[int, ...],
    groups: Mapping[str, int],
    kept: Mapping[str, str] | None = None,
    names: tuple[str, ...] = (),
    example: Any = None,
    retrace: bool = True,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a net with random inputs of these shapes, given by name if it wants `names`, or with an `example`."""

    def register(net: type[nn.Module]) -> type[nn.Module]:
        generator = torch.Generator().manual_seed(0)
        tensors = tuple(torch.randn(shape, generator=generator) for shape in shapes or (IMAGE,))
        drawn: Any = dict(zip(names, tensors)) if names else tensors if len(tensors) > 1 else tensors[0]
        TOPOLOGIES[net.__name__] = Topology(net, drawn if example is None else example, groups, kept or {}, retrace)
        return net

    return register


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    options = {"padding": kernel // 2, "bias": False, **options}
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """A trunk, then pooling and a linear head of 5 classes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, 5)

    def trunk(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.head(x.mean(tuple(range(2, x.dim()))))


# --------------------------------------------------------------------------------- residuals, concats, splits


@topology(groups={"stem.0": 8, "blocks.0.0.0": 6, "blocks.1.0.0": 6, "blocks.2.0.0": 6}, kept={"head": "output"})
class ResidualChain(Net):
    def __init__(self) -> None:
        super().__init__(8)
        self.stem = conv_bn(3, 8)
        self.blocks = nn.ModuleList(
            [nn.Sequential(conv_bn(8, 6), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)) for _ in "abc"]
        )

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x), inplace=True)
        return x


@topology(groups={"a.0": 4, "b.0": 6, "c.0": 8, "mix.0": 6})
class ConcatOfConcat(Net):
    def __init__(self) -> None:
        super().__init__(18)
        self.a, self.b, self.c, self.mix = conv_bn(3, 4), conv_bn(3, 6), conv_bn(10, 8), conv_bn(18, 6)
        self.norm = nn.BatchNorm2d(18)
        self.head = nn.Linear(6 + 18, 5)

    def trunk(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1)
        x = self.norm(torch.cat([x, self.c(x)], 1))
        return torch.cat([self.mix(x), x], 1)


@topology(groups={"a.0": 4, "left.0": 3, "right.0": 5})
class ConcatThenSplit(Net):
    """Both halves of the split must stay equal, so what was concatenated is tied across."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b, self.left, self.right = conv_bn(3, 4), conv_bn(3, 4), conv_bn(4, 3), conv_bn(4, 5)

    def trunk(self, x: Tensor) -> Tensor:
        left, right = torch.cat([self.a(x), self.b(x)], 1).chunk(2, 1)
        return torch.cat([self.left(left), self.right(right)], 1)


@topology(groups={"stem.0": 4, "a.0": 5, "b.0": 6, "c.0": 7})
class ChunkToBranches(Net):
    def __init__(self) -> None:
        super().__init__(18)
        self.stem, self.a, self.b, self.c = conv_bn(3, 12), conv_bn(4, 5, 1), conv_bn(4, 6), conv_bn(4, 7, 5)

    def trunk(self, x: Tensor) -> Tensor:
        a, b, c = torch.chunk(self.stem(x), 3, dim=1)
        return torch.cat([self.c(c), self.a(a), self.b(b)], 1)


@topology(groups={"stem.0": 4, "a.0": 5, "b.0": 6})
class SplitByNumbers(Net):
    """`split(4)` asks for its 4 however few channels are left."""

    def __init__(self) -> None:
        super().__init__(11)
        self.stem, self.a, self.b = conv_bn(3, 8), conv_bn(4, 5), conv_bn(4, 6)

    def trunk(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.stem(x), 4, dim=1)
        return torch.cat([self.a(a), self.b(b)], 1)


@topology(groups={"a.0": 5}, kept={"stem.0": "unequal"})
class UnequalSplit(Net):
    def __init__(self) -> None:
        super().__init__(7)
        self.stem, self.a = conv_bn(3, 8), conv_bn(6, 5)

    def trunk(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).split([6, 2], dim=1)
        return torch.cat([self.a(a), b], 1)


@topology(groups={"a.0": 5}, kept={"stem.0": "sliced"})
class ChannelSlices(Net):
    def __init__(self) -> None:
        super().__init__(9)
        self.stem, self.a = conv_bn(3, 8), conv_bn(4, 5)

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([self.a(x[:, :4]), x[:, 4:]], 1)


@topology(groups={"first.0": 4, "last.0": 6})
class ChannelShuffle(Net):
    """ShuffleNet by hand: (groups, k) transposed to (k, groups)."""

    def __init__(self) -> None:
        super().__init__(6)
        self.first, self.last = conv_bn(3, 8), conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        x = self.first(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)
        return self.last(x)


@topology(groups={"first.0": 4, "last.0": 6})
class ChannelShuffleLayer(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.first, self.shuffle, self.last = conv_bn(3, 8), nn.ChannelShuffle(2), conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.shuffle(self.first(x)))


@topology(groups={"first.0": 3, "down.0": 4, "last.0": 6})
class PixelShuffle(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.first, self.up = conv_bn(3, 12), nn.PixelShuffle(2)
        self.down, self.unshuffle, self.last = conv_bn(3, 4), nn.PixelUnshuffle(2), conv_bn(16, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.unshuffle(self.down(self.up(self.first(x)))))


@topology(groups={"stem.0": 6, "body.0": 4, "last.0": 4})
class ImageIsConcatenated(Net):
    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.body, self.last = conv_bn(3, 6), conv_bn(9, 4), conv_bn(7, 4)

    def trunk(self, x: Tensor) -> Tensor:
        y = self.body(torch.cat([x, self.stem(x)], 1))
        return self.last(torch.cat([y, x], 1))


@topology(groups={"stem.0": 4, "inner.0": 6})
class PaddedShortcut(Net):
    """Option A of CIFAR ResNets: the missing channels of the shortcut are zeros."""

    def __init__(self) -> None:
        super().__init__(8)
        self.stem = conv_bn(3, 4)
        self.inner, self.body = conv_bn(4, 6, stride=2), nn.Sequential(nn.Identity(), nn.Conv2d(6, 8, 1))

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.body(self.inner(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


@topology(groups={"encoder.0": 4, "middle.0": 6, "decoder.0": 5, "level.0": 6})
class UNet(Net):
    """Pooling, upsampling back and concatenation; a top-down sum as in feature pyramids."""

    def __init__(self) -> None:
        super().__init__(6)
        self.encoder, self.middle, self.decoder = conv_bn(3, 4), conv_bn(4, 6), conv_bn(10, 5)
        self.level, self.top = conv_bn(5, 6), nn.Conv2d(6, 6, 1)

    def trunk(self, x: Tensor) -> Tensor:
        shallow = self.encoder(x)
        deep = self.middle(F.max_pool2d(shallow, 2))
        up = F.interpolate(deep, scale_factor=2, mode="bilinear")
        return self.level(self.decoder(torch.cat([shallow, up], 1))) + F.interpolate(self.top(deep), size=8)


@topology(groups={"stem.0": 4, "last.0": 6})
class PoolsAreConcatenated(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = conv_bn(3, 4), conv_bn(12, 6)

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pools = [F.adaptive_avg_pool2d(x, size) for size in (1, 2)]
        return self.last(torch.cat([x, *(F.interpolate(pool, size=x.shape[2:]) for pool in pools)], 1))


# --------------------------------------------------------------------------------------------------- gates


@topology(groups={"stem.0": 8, "squeeze": 4, "last.0": 6})
class SqueezeAndExcitation(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.squeeze, self.excite, self.last = (
            conv_bn(3, 8),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 8, 1),
            conv_bn(8, 6),
        )

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return self.last(x * torch.sigmoid(gate))


@topology(groups={"stem.0": 8, "squeeze.0": 4, "last.0": 6})
class LinearSqueezeAndExcitation(Net):
    """The gate goes through linear layers, a view and `expand_as`."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = conv_bn(3, 8), conv_bn(8, 6)
        self.squeeze = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, channels, _, _ = x.size()
        gate = self.squeeze(F.adaptive_avg_pool2d(x, 1).view(batch, channels)).view(batch, channels, 1, 1)
        return self.last(x * gate.expand_as(x))


@topology(groups={"stem": 8, "last.0": 6})
class SigmoidIntoConv(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = nn.Conv2d(3, 8, 3), conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(self.stem(x)))


@topology(groups={"stem": 8, "last.0": 6})
class PlusOneIntoConv(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = nn.Conv2d(3, 8, 3), conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x) + 1)


@topology(groups={"stem": 8, "last.0": 6})
class BatchNormWithoutAffine(Net):
    """Its running mean leaves a constant behind, which the columns that read it lose."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.stem(x)))


@topology(groups={"stem": 8, "last.0": 6})
class PaddingIsNotZero(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = nn.Conv2d(3, 8, 3), conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(F.pad(self.stem(x), (1, 1, 1, 1), value=0.5))


@topology(groups={"stem": 8, "second": 6, "third": 6, "last": 6})
class PaddingModes(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")
        self.third = nn.Conv2d(6, 6, 3, padding=1, padding_mode="replicate")
        self.last = nn.Conv2d(6, 6, 3, padding="same")

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(F.pad(self.third(self.second(self.stem(x))), (1, 1, 1, 1)))


# ------------------------------------------------------------------------------------- grouped and depthwise


@topology(groups={"stem.0": 4, "grouped.0": 3, "last.0": 6}, kept={"head": "output"})
class GroupedConv(Net):
    """A unit is one channel of every conv group."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.grouped, self.last = conv_bn(3, 8), conv_bn(8, 6, groups=2), conv_bn(6, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.grouped(self.stem(x)))


@topology(groups={"stem.0": 2, "grouped.0": 2, "last.0": 6}, retrace=False)
class GroupedConvBecomesOneChannelWide(Net):
    """One of two input channels per conv group stays, so the layer then looks like a depthwise one."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.grouped, self.last = conv_bn(3, 8), conv_bn(8, 8, groups=4), conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.grouped(self.stem(x)))


@topology(groups={"expand.0": 8, "project.0": 6})
class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.expand, self.depthwise, self.project = conv_bn(3, 8, 1), conv_bn(8, 8, groups=8), conv_bn(8, 6, 1)

    def trunk(self, x: Tensor) -> Tensor:
        return self.project(self.depthwise(self.expand(x)))


@topology(groups={"expand.0": 4, "project.0": 6})
class DepthwiseMultiplier(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.expand, self.depthwise, self.project = conv_bn(3, 4, 1), conv_bn(4, 12, groups=4), conv_bn(12, 6, 1)

    def trunk(self, x: Tensor) -> Tensor:
        return self.project(self.depthwise(self.expand(x)))


@topology(groups={"expand.0": 2, "project.0": 6}, retrace=False)
class DepthwiseWithOneChannelLeft(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.expand, self.depthwise, self.project = conv_bn(3, 2, 1), conv_bn(2, 2, groups=2), conv_bn(2, 6, 1)

    def trunk(self, x: Tensor) -> Tensor:
        return self.project(self.depthwise(self.expand(x)))


@topology(groups={"stem.0": 8, "up": 6})
class ConvTranspose(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.up, self.norm = conv_bn(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.norm(self.up(self.stem(x)))


@topology(groups={"stem.0": 8, "last.0": 6})
class DepthwiseConvTranspose(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.up = conv_bn(3, 8), nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=8)
        self.last = conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.stem(x)))


@topology(groups={"stem.0": 4, "last.0": 6})
class DepthwiseConvTransposeMultiplier(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.up = conv_bn(3, 4), nn.ConvTranspose2d(4, 8, 2, stride=2, groups=4)
        self.last = conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.stem(x)))


@topology(groups={"stem.0": 4, "up": 3, "last.0": 6})
class GroupedConvTranspose(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.up = conv_bn(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.last = conv_bn(6, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.stem(x)))


@topology((2, 3, 16), groups={"stem": 8, "up": 6})
class OneDimension(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.norm = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)
        self.deep, self.up = nn.Conv1d(8, 8, 3, groups=8), nn.ConvTranspose1d(8, 6, 2)

    def trunk(self, x: Tensor) -> Tensor:
        return self.up(F.max_pool1d(F.relu(self.deep(self.norm(self.stem(x)))), 2))


@topology((2, 2, 4, 6, 6), groups={"stem": 8, "last": 6})
class ThreeDimensions(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.norm, self.last = nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Conv3d(8, 6, 3)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(F.avg_pool3d(F.relu(self.norm(self.stem(x))), (1, 2, 2)))


# ------------------------------------------------------------------------------------------- sharing, modes


@topology(groups={"stem.0": 8})
class SharedModule(Net):
    def __init__(self) -> None:
        super().__init__(8)
        self.stem, self.twice, self.norm = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = F.relu(self.norm(self.twice(x)) + x)
        return x


@topology(groups={"stem.0": 4, "a.0": 3, "last.0": 6}, kept={"head": "output"})
class LayersUnderTwoNames(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = conv_bn(3, 8), conv_bn(6, 6)
        self.a = self.b = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6))

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(F.relu(self.a(x)) + self.b(-x))


@topology(groups={"stem.0": 8, "a": 8, "last.0": 6})
class SharedParameters(Net):
    """Two layers, one weight: it stays one weight."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.a, self.b, self.last = conv_bn(3, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), conv_bn(8, 6)
        self.b.weight = self.a.weight

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(self.a(x) + F.relu(self.b(x)))


@topology((2, 3, 8, 8), (2, 1, 8, 8), groups={"left.0": 6, "right.0": 4, "last.0": 6})
class TwoInputs(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.left, self.right, self.last = conv_bn(3, 6), conv_bn(1, 4), conv_bn(10, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.last(torch.cat([self.left(x), self.right(y)], 1)).mean((2, 3)))


@topology((2, 3, 8, 8), (2, 4), names=("image", "vector"), groups={"stem.0": 6, "embed": 5})
class DictInputs(Net):
    def __init__(self) -> None:
        super().__init__(11)
        self.stem, self.embed = conv_bn(3, 6), nn.Linear(4, 5)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        features = torch.cat([self.stem(image).mean((2, 3)), self.embed(vector)], -1)
        return {"classes": self.head(features)}


@topology(groups={"stem.0": 6, "deep.0": 6}, kept={"side.0": "output", "head": "output"})
class SeveralOutputs(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.deep, self.side = conv_bn(3, 6), conv_bn(6, 6), conv_bn(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], None]:
        x = self.stem(x)
        return super().forward(x), {"map": self.side(x)}, None

    def trunk(self, x: Tensor) -> Tensor:
        return self.deep(x)


@topology(groups={"stem.0": 6}, kept={"unused": "not used"})
class UnusedLayer(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.unused = conv_bn(3, 6), nn.Conv2d(6, 6, 3)

    def trunk(self, x: Tensor) -> Tensor:
        return self.stem(x)


@topology(groups={"stem.0": 6, "aux.0.0": 4, "last.0": 6}, kept={"aux.3": "output"})
class AuxiliaryHead(Net):
    """Only there in train mode; its inputs must shrink with the trunk all the same."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = conv_bn(3, 6), conv_bn(6, 6)
        self.aux = nn.Sequential(conv_bn(6, 4), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 64, 5))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        out = super().forward(x)
        return (out, self.aux(x)) if self.training else out

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(x, 0.3, self.training))


@topology(groups={"stem.0": 8, "last.0": 6})
class Frozen(Net):
    """Frozen weights and a norm that never leaves eval mode are pruned like any other."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = conv_bn(3, 8), conv_bn(8, 6)
        self.stem.requires_grad_(False)

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.stem[1].eval()
        return self

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x))


# --------------------------------------------------------------------------------- norms, bare parameters


@topology(groups={"stem": 8, "middle": 4, "last": 6})
class GroupNorms(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.each = nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8)
        self.middle, self.pairs = nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8)
        self.last = nn.Conv2d(8, 6, 1)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.pairs(self.middle(self.each(self.stem(x)))))


@topology(groups={"stem": 8, "middle": 8, "last": 6})
class InstanceNorms(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.plain = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8)
        self.middle, self.affine = nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8, affine=True)
        self.last = nn.Conv2d(8, 6, 1)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.affine(self.middle(self.plain(self.stem(x)))))


@topology(groups={"stem": 8, "last": 6})
class InstanceNormWithStatistics(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.last = nn.Conv2d(8, 6, 1)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.stem(x)))


@topology(groups={"blocks.0.widen": 12, "blocks.1.widen": 12}, kept={"stem": "layer norm"})
class ConvNeXt(Net):
    """Layer norm over channels in NHWC keeps the width of the trunk; layer scale and the inner widths follow."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.norm = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6)
            self.widen, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)
            self.scale = nn.Parameter(torch.full((6, 1, 1), 0.1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            return x + self.scale * self.narrow(F.gelu(self.widen(y))).permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.blocks = nn.Conv2d(3, 6, 2, stride=2), nn.Sequential(self.Block(), self.Block())

    def trunk(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


@topology(groups={"blocks.0.widen": 12, "blocks.1.widen": 12}, kept={"stem": "layer norm"}, retrace=False)
class NormWithinMlp(Net):
    """A norm over an inner width goes on counting what it lost; one over the residual stream keeps it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.widen, self.inner, self.narrow = (
                nn.LayerNorm(6),
                nn.Linear(6, 12),
                nn.LayerNorm(12),
                nn.Linear(12, 6),
            )

        def forward(self, x: Tensor) -> Tensor:
            return x + self.narrow(self.inner(F.gelu(self.widen(self.norm(x)))))

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.blocks = nn.Conv2d(3, 6, 2, stride=2), nn.Sequential(self.Block(), self.Block())

    def trunk(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@topology(groups={"stem": 8, "middle": 8, "last": 6})
class PReLUs(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.one = nn.Conv2d(3, 8, 3), nn.PReLU()
        self.middle, self.many, self.last = nn.Conv2d(8, 8, 3), nn.PReLU(8), nn.Conv2d(8, 6, 1)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.many(self.middle(self.one(self.stem(x)))))


@topology(groups={"stem": 8, "branch": 8, "last": 6})
class BareScaleAndBias(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.branch, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(1, 8, 1, 1))

    def trunk(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.last(self.branch(x) * self.scale.view(-1, 1, 1) + self.shift)


@topology(groups={"stem": 8, "last.0": 6})
class WeightStandardised(Net):
    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            mean = self.weight.mean((1, 2, 3), keepdim=True)
            deviation = self.weight.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), self.bias, self.stride, self.padding)

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = self.Conv(3, 8, 3), conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x))


# ---------------------------------------------------------------------------------- linear layers, attention


@topology((2, 7), groups={"layers.0": 12, "layers.2": 10})
class LinearOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@topology(groups={"stem": 6}, kept={"last": "output"})
class OneOutputChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.last(F.relu(self.stem(x))))


@topology(groups={"stem.0": 6, "hidden": 8})
class FlattenToLinear(nn.Module):
    """Every channel is 2 x 2 columns of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = conv_bn(3, 6), nn.Linear(24, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_max_pool2d(self.stem(x), 2)
        return self.head(F.relu(self.hidden(torch.flatten(x, 1))))


@topology(groups={"stem.0": 6, "hidden": 8})
class ViewWithNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = conv_bn(3, 6), nn.Linear(24, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_max_pool2d(self.stem(x), 2)
        return self.head(F.relu(self.hidden(x.view(-1, 24))))


@topology(groups={"attention": 4, "widen": 12}, kept={"stem": "layer norm"})
class FusedAttention(Net):
    """Heads are units: a compacted nn.MultiheadAttention takes its sizes from its weights."""

    def __init__(self) -> None:
        super().__init__(8)
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.widen, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.narrow(F.gelu(self.widen(x)))
        return self.head(x.mean(1))


@topology(groups={"qkv": 4, "widen": 12}, kept={"stem": "layer norm"})
class AttentionThatCountsItsHeads(Net):
    """Hand-written qkv whose numbers of heads and inner features are attributes: heads are units."""

    def __init__(self) -> None:
        super().__init__(8)
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.num_heads, self.inner = 4, 12
        self.qkv, self.project = nn.Linear(8, 36), nn.Linear(12, 8)
        self.widen, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, length, 3, self.num_heads, 3).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * 3**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.project((weights @ v).transpose(1, 2).reshape(batch, length, self.inner))
        x = x + self.narrow(F.gelu(self.widen(x)))
        return self.head(x.mean(1))


@topology(groups={"attention.qkv": 3, "widen": 12}, kept={"stem": "layer norm"})
class WindowAttention(Net):
    """Swin's: the columns of the table of position biases are part of their head."""

    def __init__(self) -> None:
        super().__init__(6)
        from torchvision.models.swin_transformer import ShiftedWindowAttention

        self.stem, self.norm = nn.Conv2d(3, 6, 2, stride=2), nn.LayerNorm(6)
        self.attention = ShiftedWindowAttention(6, [2, 2], [1, 1], 3)
        self.widen, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.attention(self.norm(x))
        x = x + self.narrow(F.gelu(self.widen(x)))
        return self.head(x.mean((1, 2)))


@topology(groups={"qkv": 2, "widen": 12}, retrace=False)
class HandWrittenAttention(Net):
    """Softmax of bmm; the code asks for the numbers of heads and of head dimensions that it was written for."""

    def __init__(self) -> None:
        super().__init__(8)
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.widen, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1) * 4**-0.5).softmax(-1)
        x = x + self.project((weights @ v).transpose(1, 2).reshape(batch, length, width))
        x = x + self.narrow(F.gelu(self.widen(x)))
        return self.head(x.mean(1))


@topology(groups={"stem.0": 8, "query": 4, "value": 6, "last.0": 6})
class NonLocal(Net):
    """Attention over places by bmm: the widths of keys and values are units."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.query, self.key = conv_bn(3, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.value, self.last = nn.Conv2d(8, 6, 1), conv_bn(6, 6)

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = self.query(x).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2)
        weights = torch.bmm(q.transpose(1, 2), k).softmax(-1)
        out = torch.bmm(v, weights.transpose(1, 2))
        return self.last(out.view(x.shape[0], -1, *x.shape[2:]))


@topology(groups={"stem.0": 8, "last.0": 6})
class Einsum(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = conv_bn(3, 8), conv_bn(8, 6)
        self.weight, self.mix = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 4))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scaled = torch.einsum("bchw,c->bchw", x, self.weight)
        mixed = torch.einsum("bchw,cd->bdhw", scaled, self.mix)
        return self.head(torch.cat([self.last(scaled), mixed], 1).mean((2, 3)))


@topology(groups={"stem.0": 8, "last.0": 6}, kept={"gate": "mean", "map": ""})
class MeanOverChannels(Net):
    """A mean over channels divides by their number, so its input stays."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.gate, self.map = conv_bn(3, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(1, 1, 3, padding=1)
        self.last = conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        place = torch.sigmoid(self.map(F.relu(self.gate(x)).mean(1, keepdim=True)))
        return self.last(x * place)


@topology(groups={"stem": 8}, example=torch.arange(14).view(2, 7) % 10)
class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.stem, self.head = nn.Embedding(10, 6), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.stem(self.table(tokens))).mean(1))


# -------------------------------------------------------------------------------------------------- in place


@topology(groups={"stem": 8})
class InPlace(Net):
    def __init__(self) -> None:
        super().__init__(8)
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def trunk(self, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))
        y = self.body(x).mul_(2)
        y = F.leaky_relu(y, inplace=True)
        y = torch.cat([x, y], 1)[:, :, 1:].clone()
        y += 0 * y
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).unflatten(1, (2, -1)).sum(1).mean((2, 3)))


@topology(groups={"last.0": 6}, kept={"stem": "view"})
class InPlaceThroughView(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = nn.Conv2d(3, 8, 3), conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x[:, :, 0] = 1.0
        return self.last(x)


@topology(groups={"last.0": 6}, kept={"stem": ""})
class InPlaceBehindView(Net):
    """The view was taken before the write, and sees it."""

    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.last = nn.Conv2d(3, 8, 3), conv_bn(8, 6)

    def trunk(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        view = x.flatten(2).unflatten(2, x.shape[2:])
        x.add_(1)
        return self.last(view)

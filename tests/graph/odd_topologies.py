"""Tiny nets with unusual code: each compacts exactly, or keeps what it must with a reason."""

import torch
import torch.nn.functional as F
from topologies import Net, conv_bn, topology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Trunk(Net):
    """stem (8 channels), whatever a test does with them, last (8 -> 6 unless said otherwise), head."""

    def __init__(self, inputs: int = 8, norm: bool = True) -> None:
        super().__init__(6)
        self.stem = conv_bn(3, 8) if norm else nn.Conv2d(3, 8, 3, padding=1)
        self.last = conv_bn(inputs, 6)

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.stem(x)))

    def between(self, x: Tensor) -> Tensor:
        return x


@topology(groups={"stem.0": 4, "last.0": 6})
class ReorderedChunks(Trunk):
    def between(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([b, -a], 1)


@topology(groups={"last.0": 6}, kept={"stem.0": "repeat"})
class RepeatedChannels(Trunk):
    def __init__(self) -> None:
        super().__init__(16)

    def between(self, x: Tensor) -> Tensor:
        return x.repeat(1, 2, 1, 1)


@topology(groups={"stem.0": 8, "last.0": 6})
class ExpandedInSpace(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).expand(-1, -1, 4, 4)


@topology(groups={"stem.0": 8, "last.0": 6}, kept={"one.0": "one channel"})
class OneChannelForAll(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.one = conv_bn(8, 1)

    def between(self, x: Tensor) -> Tensor:
        return self.one(x).expand(-1, 8, -1, -1)


@topology(groups={"last.0": 6}, kept={"stem.0": "index"})
class ChannelsByNumber(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return x[:, [7, 6, 5, 4, 3, 2, 1, 0]]


@topology(groups={"last.0": 6}, kept={"stem.0": "gather"})
class GatheredChannels(Trunk):
    def between(self, x: Tensor) -> Tensor:
        index = torch.arange(8).flip(0).view(1, 8, 1, 1).expand(x.shape[0], -1, x.shape[2], x.shape[3])
        return x.gather(1, index)


@topology(groups={"last.0": 6}, kept={"stem.0": "cumsum"})
class CumulativeSum(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


@topology(groups={"last.0": 6}, kept={"stem.0": "softmax"})
class SoftmaxOverChannels(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return x * x.softmax(1)


@topology(groups={"stem.0": 8, "last.0": 6})
class SoftmaxOverPlaces(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(8, 8, 1)

    def between(self, x: Tensor) -> Tensor:
        return x * self.gate(x).flatten(2).softmax(-1).view_as(x)


@topology(groups={"stem.0": 8, "last.0": 6})
class NormalisedOverChannels(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


@topology(groups={"stem.0": 8, "last.0": 6})
class DividedByItsSum(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return x / (x.sum(1, keepdim=True) + 1)


@topology(groups={"stem.0": 8, "last.0": 6})
class DividedByChannels(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean((2, 3), keepdim=True) + 0.1)


@topology(groups={"last.0": 6}, kept={"stem.0": "divides by values"})
class DividedByItself(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return x / x.abs().mean((2, 3), keepdim=True)


@topology(groups={"last.0": 6}, kept={"stem": "would become zero"})
class ReciprocalRoot(Trunk):
    """Zero times infinity is not zero."""

    def __init__(self) -> None:
        super().__init__(norm=False)

    def between(self, x: Tensor) -> Tensor:
        return x * x.square().mean((2, 3), keepdim=True).rsqrt()


@topology(groups={"stem": 8, "last.0": 6})
class SafeReciprocalRoot(Trunk):
    def __init__(self) -> None:
        super().__init__(norm=False)

    def between(self, x: Tensor) -> Tensor:
        return x * (x.square().mean((2, 3), keepdim=True) + 1e-3).rsqrt()


@topology(groups={"last.0": 6}, kept={"stem": "power"})
class NegativePower(Trunk):
    def __init__(self) -> None:
        super().__init__(norm=False)

    def between(self, x: Tensor) -> Tensor:
        return x * x.square().mean((2, 3), keepdim=True).pow(-0.5)


@topology(groups={"stem.0": 8, "last.0": 6})
class WhereAbove(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return torch.where(x > 0.5, x, x * 0.1)


@topology(groups={"stem.0": 8, "last.0": 6})
class WhereWithConstant(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return torch.where(x > 0.5, x, 0.3)


@topology(groups={"stem.0": 8, "last.0": 6})
class MaskFilledWithZero(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return x.masked_fill(x < 0.2, 0.0)


@topology(groups={"stem.0": 8, "last.0": 6})
class MaskFilledWithNumber(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return x.masked_fill(x < 0.2, -1.0)


@topology(groups={"last.0": 6}, kept={"stem.0": "max"})
class BlockAttention(Trunk):
    """CBAM: maximum and mean over channels gate the places."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(2, 1, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        pools = torch.cat([torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)], 1)
        return x * torch.sigmoid(self.gate(pools))


@topology(groups={"stem.0": 8, "last.0": 6})
class MaximumOverPlaces(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return x.amax(-1, keepdim=True) + x.max(-1, keepdim=True).values - x.min(-2, keepdim=True)[0]


@topology(groups={"stem.0": 8}, kept={"lstm": "lstm has no pruning rule", "mix": "lstm"})
class Lstm(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.stem, self.mix, self.lstm = conv_bn(3, 8), nn.Conv2d(8, 4, 1), nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.mix(self.stem(x)).mean(2).transpose(1, 2)
        return self.head(self.lstm(steps)[0][:, -1])


@topology(groups={"stem.0": 8, "mix": 16, "side": 5})
class BranchesOnShapes(Net):
    def __init__(self) -> None:
        super().__init__(16)
        self.stem, self.mix, self.side = conv_bn(3, 8), nn.Linear(8, 16), nn.Linear(16, 5)
        self.head = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.dim() == 4 and x.size(-1) > 2:
            x = F.adaptive_avg_pool2d(x, 1)
        x = x.view(x.size(0), -1)
        x = self.mix(x).relu() if x.shape[0] > 0 else x
        return self.head(self.side(x))


@topology(groups={"stem.0": 8, "inner": 10, "outer": 4})
class TokensAsBatch(Net):
    """`reshape(-1, C)` with C read from the tensor."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.inner, self.outer = conv_bn(3, 8), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        y = self.outer(F.relu(self.inner(x.reshape(-1, channels))))
        return self.head(y.view(batch, height * width, -1).mean(-2))


@topology(groups={"stem.0": 8, "inner": 10, "outer": 4})
class TokensAsBatchByNumber(Net):
    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.inner, self.outer = conv_bn(3, 8), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        y = self.outer(F.relu(self.inner(x.reshape(-1, 8))))
        return self.head(y.view(x.shape[0], -1, 4).mean(-2))


@topology(groups={"inner": 10, "outer": 4}, kept={"stem.0": ""})
class ChannelsAsBatch(Net):
    """Every channel goes through the same little net: their number must not be lost from sight."""

    def __init__(self) -> None:
        super().__init__(4)
        self.stem, self.inner, self.outer = nn.Sequential(nn.Conv2d(3, 8, 1)), nn.Conv2d(1, 10, 3), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.outer(F.relu(self.inner(x.reshape(-1, 1, *x.shape[2:]))))
        return self.head(y.view(x.shape[0], -1, 4, *y.shape[2:]).mean((1, 3, 4)))


@topology(groups={"weight": 8, "last.0": 6})
class FunctionalReuse(Trunk):
    """One weight used by two functional convolutions at different strides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def between(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1) + F.conv2d(F.relu(x), self.weight, padding=2, dilation=2) + x


@topology((2, 7), groups={}, kept={"encoder": ""})
class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.encoder(x)), self.encoder.weight.t())


@topology(groups={"last.0": 6}, kept={"stem.0": "view_as_complex"})
class ComplexNumbers(Trunk):
    def between(self, x: Tensor) -> Tensor:
        y = torch.view_as_complex(x.unflatten(1, (4, 2)).movedim(2, -1).contiguous())
        return torch.view_as_real(y * y.conj()).movedim(-1, 2).flatten(1, 2)


@topology(groups={"last.0": 6}, kept={"stem.0": "fft"})
class FourierTransform(Trunk):
    def between(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x, norm="ortho").abs()


@topology(groups={"stem.0": 8, "last.0": 6})
class MaskBuffer(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1]).view(1, -1, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        return x * self.mask


@topology(groups={"stem.0": 8, "last.0": 6})
class HandWrittenStatistics(Trunk):
    """A buffer called running_mean that no batch norm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.randn(8))

    def between(self, x: Tensor) -> Tensor:
        return x - self.running_mean[:, None, None]


@topology(groups={"stem": 6, "blocks.0.widen": 12, "blocks.1.widen": 12})
class ChannelsLastBlocks(nn.Module):
    """Linear layers in NHWC, depthwise convolutions in NCHW."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widen, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)
            self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)

        def forward(self, x: Tensor) -> Tensor:
            y = F.gelu(self.widen(x)).permute(0, 3, 1, 2)
            return x + self.narrow(F.relu(self.depthwise(y)).permute(0, -2, -1, 1))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Conv2d(3, 6, 1),
            nn.Sequential(self.Block(), self.Block()),
            nn.Linear(6, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).permute(0, 2, 3, 1)).mean((-3, -2)))


@topology(groups={"stem.0": 8, "hidden": 10})
class AverageAndMaximumPool(nn.Module):
    """fastai's AdaptiveConcatPool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = conv_bn(3, 8), nn.Linear(16, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([F.adaptive_max_pool2d(x, 1), F.adaptive_avg_pool2d(x, 1)], dim=-3)
        return self.head(self.hidden(x.flatten(1)))


@topology(groups={"stem.0": 8, "body.0": 8, "last.0": 6})
class StochasticDepth(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(8, 8), nn.Conv2d(8, 8, 1))

    def between(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.training:
            y = y * torch.empty(y.shape[0], 1, 1, 1, dtype=y.dtype).bernoulli_(0.8).div_(0.8)
        return x + y


@topology(groups={"stem.0": 8, "body.0": 8, "side.0.0": 4, "last.0": 6}, kept={"side.2": "output"})
class StochasticDepthWithAuxiliaryHead(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(8, 8), nn.Conv2d(8, 8, 1))
        self.side = nn.Sequential(conv_bn(8, 4), nn.Dropout2d(0.2), nn.Conv2d(4, 5, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        keep = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype).bernoulli_(0.8) if self.training else 1
        x = x + self.body(x) * keep
        out = self.head(self.last(F.dropout2d(x, 0.1, self.training)).mean((2, 3)))
        return (out, self.side(x)) if self.training else out


@topology(groups={"stem.0": 8, "body.0": 8, "last.0": 6})
class Checkpointed(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(8, 8)

    def between(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


@topology(groups={"frozen.0": 8, "stem.0": 8, "last.0": 6})
class WithoutGradient(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = conv_bn(3, 8)
        self.stem = conv_bn(8, 8)

    def trunk(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return super().trunk(x)


@topology(groups={"stem.0": 8, "body.0": 6, "last.0": 6})
class AutocastIsOff(Trunk):
    def __init__(self) -> None:
        super().__init__(6)
        self.body = conv_bn(8, 6)

    def between(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.body(x)


@topology(groups={"first": 7, "last.0": 6}, kept={"stem": ""})
class TimeShift(Trunk):
    """Padding by 1 and -1 moves channels without changing their number."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.first, self.stem = nn.Conv2d(3, 7, 1), nn.Conv2d(7, 8, 1)

    def trunk(self, x: Tensor) -> Tensor:
        return super().trunk(self.first(x))

    def between(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 1, -1))


@topology(groups={"mix": 8, "stem": 8, "last.0": 6})
class SigmoidIntoMatrixProduct(Trunk):
    """The columns of a bare weight stay as they are when what they read dies."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.mix = nn.Parameter(torch.randn(8, 8))

    def between(self, x: Tensor) -> Tensor:
        return (torch.sigmoid(x).movedim(1, -1) @ self.mix).movedim(-1, 1)


@topology(groups={"last.0": 6}, kept={"stem": "not zero"})
class SigmoidIntoEinsum(Trunk):
    def __init__(self) -> None:
        super().__init__(norm=False)
        self.mix = nn.Parameter(torch.randn(8, 8))

    def between(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", torch.sigmoid(x), self.mix)


@topology(groups={"last.0": 6}, kept={"stem": "", "read": ""})
class ColumnsActAsScale(Trunk):
    """The same columns read the channels and scale their sigmoid."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.read = nn.Conv2d(8, 8, 1)

    def between(self, x: Tensor) -> Tensor:
        scale = self.read.weight.sum(0)
        return self.read(x).sum(1, keepdim=True) * 0 + F.conv2d(torch.sigmoid(x) * scale, self.read.weight)


@topology(groups={"last.0": 6}, kept={"stem.0": "picked by its number"})
class PairPickedByNumber(Trunk):
    """Rotary-style pairs: of (channels / 2, 2), one half is picked by number."""

    def __init__(self) -> None:
        super().__init__(4)

    def between(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2))[:, :, 0]


@topology(groups={"stem.0": 4, "last.0": 6})
class HalvesAreSummed(Trunk):
    """Split attention: (2, channels / 2) summed over the 2."""

    def __init__(self) -> None:
        super().__init__(4)

    def between(self, x: Tensor) -> Tensor:
        parts = x.view(x.shape[0], 2, -1, *x.shape[2:])
        weights = parts.sum(1).mean((2, 3), keepdim=True)
        return (parts * torch.stack([weights, -weights], 1).softmax(1)).sum(dim=1)


@topology(groups={"weight": 8, "last.0": 6}, kept={"stem.0": "make and read"})
class ModulatedConvolution(Trunk):
    """StyleGAN: the batch becomes conv groups, with a weight for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def between(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        style = self.style(x.mean((2, 3))).view(batch, 1, channels, 1, 1)
        weight = (self.weight * style).flatten(0, 1)
        out = F.conv2d(x.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
        return out.view(batch, -1, height, width)


@topology(groups={"stem.0.parametrizations.weight": 8, "last.0": 6})
class WeightNorm(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.stem[0] = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))


@topology(groups={"wide": 8, "last.0": 6}, kept={"stem.0": "var_mean over this axis"})
class StandardisedWeight(Trunk):
    """A row of a weight loses its mean, which is one over all columns: these stay."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 8, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        weight = self.wide.weight
        variance, mean = torch.var_mean(weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (weight - mean) / torch.sqrt(variance + 1e-10), self.wide.bias, padding=1)


@topology(groups={"stem.0.parametrizations.weight": 8, "wide.parametrizations.weight": 8, "last.0": 6})
class SpectralNorm(Trunk):
    """Weights are divided by an estimate of their largest singular value, which dead rows and columns do not change."""

    norm = staticmethod(nn.utils.parametrizations.spectral_norm)

    def __init__(self) -> None:
        super().__init__()
        self.stem[0], self.wide = self.norm(nn.Conv2d(3, 8, 3)), self.norm(nn.Conv2d(8, 8, 3, padding=1))

    def between(self, x: Tensor) -> Tensor:
        return self.wide(x)


@topology(groups={"stem.0": 8, "wide": 8, "last.0": 6})
class OlderSpectralNorm(SpectralNorm):
    norm = staticmethod(nn.utils.spectral_norm)


@topology(groups={"stem.0": 8, "wide": 8, "last.0": 6})
class GatedLinearUnit(Trunk):
    """A value and its gate go together."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 16, 1)

    def between(self, x: Tensor) -> Tensor:
        return F.glu(self.wide(x), 1)


@topology(groups={"stem.0": 8, "last.0": 6})
class TokenIsRepeated(Trunk):
    """A parameter becomes as long as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 8, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        return x * self.token.repeat(len(x), 1, 1, 1)


@topology(groups={"stem.0": 8, "last.0": 6})
class StackedSideBySide(Trunk):
    def __init__(self) -> None:
        super().__init__(16)

    def between(self, x: Tensor) -> Tensor:
        return torch.hstack([x, x.tanh()])


@topology(groups={"stem.0": 8, "last.0": 6})
class ConcatWithZeros(Trunk):
    def __init__(self) -> None:
        super().__init__(16)

    def between(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), x], 1)


@topology(groups={"stem.0": 8, "last.0": 6})
class GrowingConcat(Trunk):
    """Starts from an empty tensor."""

    def __init__(self) -> None:
        super().__init__(16)

    def between(self, x: Tensor) -> Tensor:
        out = x.new_empty(0)
        for part in (x, x.tanh()):
            out = torch.cat([out, part], 1)
        return out


@topology(groups={"stem.0": 8, "last.0": 6}, kept={"one": "one channel"})
class GateForAllChannels(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(8, 1, 1)

    def between(self, x: Tensor) -> Tensor:
        return x * self.one(x).sigmoid().expand_as(x)


@topology(groups={"stem": 4, "last.0": 6})
class ReluBehindView(Trunk):
    """Nothing reads the tensor under its old name, so writing through the view is harmless."""

    def __init__(self) -> None:
        super().__init__(norm=False)

    def between(self, x: Tensor) -> Tensor:
        y = x.view(x.shape[0], 2, -1, *x.shape[2:]).flatten(1, 2)
        return F.relu_(y)


@topology(groups={"last.0": 6}, kept={"stem": "in place"})
class HalfIsWrittenInPlace(Trunk):
    def __init__(self) -> None:
        super().__init__(norm=False)

    def between(self, x: Tensor) -> Tensor:
        x.unflatten(1, (2, 4))[:, 0].add_(1)
        return x


@topology(groups={"last.0": 6}, kept={"stem.0": ""})
class ScatteredChannels(Trunk):
    def between(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=x.dtype)
        out[:, 1:] = x[:, :-1]
        return out


@topology(groups={"stem.0": 8, "last.0": 6})
class BatchStatisticsWithoutAffine(Trunk):
    def __init__(self) -> None:
        super().__init__(norm=False)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False, track_running_stats=False))


@topology(groups={"stem": 8, "q": 3, "proj": 8, "last.0": 6}, retrace=False)
class HeadsArePooledOneByOne(Trunk):
    """A convolution whose batch is inputs times heads, as in multiscale transformers."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.heads, self.dim = 3, 4
        self.q, self.v, self.proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.pool, self.norm = nn.Conv2d(4, 4, 3, 1, 1, groups=4, bias=False), nn.LayerNorm(4)

    def between(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        q, v = self.pooled(self.q(tokens), x), self.pooled(self.v(tokens), x)
        out = F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2)
        return self.proj(out).mT.unflatten(2, x.shape[2:])

    def pooled(self, tokens: Tensor, x: Tensor) -> Tensor:
        maps = tokens.reshape(len(x), -1, self.heads, self.dim).permute(0, 2, 3, 1)  # (B, heads, D, N)
        maps = self.pool(maps.reshape(-1, self.dim, *x.shape[2:]))
        return self.norm(maps.reshape(len(x), -1, self.dim, maps.shape[-1] ** 2).transpose(2, 3))


@topology(groups={"stem": 8, "qkv": 3, "proj": 8, "last.0": 6}, retrace=False)
class AttentionWithinWindows(Trunk):
    """Heads before windows: (batch, heads, windows, tokens, dimensions)."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.heads, self.dim = 3, 4
        self.qkv, self.proj = nn.Linear(8, 36), nn.Linear(12, 8)
        self.places = nn.Parameter(torch.randn(1, 4, 16, 8))

    def between(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT.unflatten(1, (4, -1)) + self.places
        qkv = self.qkv(tokens).reshape(*tokens.shape[:3], 3, self.heads, self.dim).permute(3, 0, 4, 1, 2, 5)
        out = F.scaled_dot_product_attention(*qkv.unbind(0)).permute(0, 2, 3, 1, 4).flatten(3)
        return self.proj(out).flatten(1, 2).mT.unflatten(2, x.shape[2:])

"""Run layers that take statistics over channels, some of which they have lost.

A layer norm averages over channels, a global response norm compares each with the mean of all, weight standardisation
averages over all weights of an output. Exact removal needs the lost ones to be counted on, as the zeros that they were.
Each such layer gets a class with the same parameters whose forward does so; a layer becomes one in place when it is
compacted, or rebuilt from a slim file. The graph is read in this form, too, so the rules need not know these layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlimLayerNorm(nn.LayerNorm):
    """Averages over `normalized_shape` channels; those that have lost their weight count as zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., channels left)"""
        left, all_channels = x.shape[-1], self.normalized_shape[0]
        x, weight, bias = (F.pad(each, (0, all_channels - left)) for each in (x, self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)[..., :left]


class SlimResponseNorm(nn.Module):
    """Global response normalisation (arXiv 2301.00808, §3.2) of which the mean is over `counted` channels.

    Takes the attributes of timm's layer where it has them, else the fixed numbers of that of transformers.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    counted: int

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C), or (B, C, H, W) if the layer was built for it"""
        places, channels = getattr(self, "spatial_dim", (1, 2)), getattr(self, "channel_dim", -1)
        shape = getattr(self, "wb_shape", (1, 1, 1, -1))
        norms = torch.linalg.vector_norm(x, dim=places, keepdim=True)  # (B, 1, 1, C)
        response = norms / (norms.sum(channels, keepdim=True) / self.counted + getattr(self, "eps", 1e-6))
        out: Tensor = x + self.bias.view(shape) + self.weight.view(shape) * (x * response)
        return out


class SlimStandardisedConv(nn.Conv2d):
    """A convolution whose weights are standardised (arXiv 1903.10520) over `counted` entries per output."""

    counted: int
    eps: float
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W)"""
        if getattr(self, "same_pad", False):
            x = self._padded(x)
        return F.conv2d(x, self._standardised(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _standardised(self) -> Tensor:
        mean = self.weight.sum((1, 2, 3), keepdim=True) / self.counted  # (rows, 1, 1, 1)
        variance = self.weight.square().sum((1, 2, 3), keepdim=True) / self.counted - mean.square()
        weight = (self.weight - mean) * torch.rsqrt(variance + self.eps)
        gain = self._parameters.get("gain")  # (rows, 1, 1, 1)
        return weight if gain is None else weight * (gain * self.scale)

    def _padded(self, x: Tensor) -> Tensor:
        """Pad as TensorFlow does, more behind than before."""
        pad = []
        for size, kernel, stride, dilation in zip(x.shape[:1:-1], *map(reversed, self._window()), strict=True):
            lost = max((-(size // -stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pad += [lost // 2, lost - lost // 2]
        return F.pad(x, pad)

    def _window(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return self.kernel_size, self.stride, self.dilation


SlimCounting = SlimLayerNorm | SlimResponseNorm | SlimStandardisedConv
# Layers of other packages, by package and name: they are recognised without importing them.
RESPONSE_NORMS = {("timm", "GlobalResponseNorm"), ("transformers", "ConvNextV2GRN")}
STANDARDISED_CONVS = {
    ("timm", name) for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
}


def can_lose_channels(module: nn.Module) -> bool:
    """Tell whether a `SlimLayerNorm` can replace this layer norm: PyTorch's own, or timm's, which computes the same."""
    kind = type(module)
    is_plain = kind is nn.LayerNorm or (kind.__name__ == "LayerNorm" and kind.__module__.startswith("timm."))
    if not is_plain or not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1:
        return False
    return module.weight is not None and module.bias is not None


def fit_counting_layer_(module: nn.Module) -> bool:
    """Give a layer that has lost channels the class that counts them on.

    Returns whether nothing else of the layer needs to change.
    """
    if can_lose_channels(module) or isinstance(module, SlimLayerNorm):
        assert isinstance(module, nn.LayerNorm)
        if module.weight.shape != module.normalized_shape:
            module.__class__ = SlimLayerNorm
        return True
    kind = _counting_class(module)
    if kind and vars(module).get("counted", _count(module)) != _count(module):
        module.__class__ = kind
    return kind is SlimResponseNorm


def note_count_(module: nn.Module) -> None:
    """Remember how many channels a layer counts. Call before it loses any."""
    if _counting_class(module):
        vars(module).setdefault("counted", _count(module))


@contextmanager
def counting_form(model: nn.Module) -> Iterator[None]:
    """Temporarily give layers the class that counts channels by number, which shows that some could be lost."""
    swapped = []
    for module in model.modules():
        kind = _counting_class(module)
        if kind and not isinstance(module, kind):
            swapped.append((module, type(module), "counted" in vars(module)))
            note_count_(module)
            module.__class__ = kind
    try:
        yield
    finally:
        for module, kind, had_count in swapped:
            module.__class__ = kind
            if not had_count:
                vars(module).pop("counted", None)


def _counting_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that can count for this layer; None if it is no such layer. Layer norms name their own count."""
    kind = type(module)
    name = (kind.__module__.partition(".")[0], kind.__name__)
    if name in RESPONSE_NORMS or kind is SlimResponseNorm:
        return SlimResponseNorm
    if name in STANDARDISED_CONVS or kind is SlimStandardisedConv:
        return SlimStandardisedConv
    return None


def _count(module: nn.Module) -> int:
    """Count the channels, or weights per output, that a layer has."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.numel() if _counting_class(module) is SlimResponseNorm else weight[0].numel())

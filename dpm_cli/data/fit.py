"""Make images and their statistics fit a model's input.

Results are bit for bit what earlier runs trained on; torchvision's resize rounds differently and has another grey.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dpm_cli.errors import DataError
from dpm_cli.layers.images import Shape

LUMA = (0.299, 0.587, 0.114)  # red, green and blue in grey, ITU-R 601, as PIL has it
CHUNK = 4096  # images resized at once, to bound the memory for floats


def fit_pixels(pixels: Tensor, shape: Shape) -> Tensor:
    """Turn images (N, C, H, W) uint8 into (N, *shape): mix or repeat channels, scale the short side, crop."""
    channels, height, width = shape
    if tuple(pixels.shape[1:]) == shape:
        return pixels.contiguous()
    return torch.cat([_resize(_recolour(part, channels), height, width) for part in torch.split(pixels, CHUNK)])


def fit_statistics(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Turn statistics of one or three channels into those of `channels`: repeat them, or weight them to grey."""
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1:
        return tuple(values) * channels
    return (sum(weight * value for weight, value in zip(LUMA, values, strict=True)),)


def check_shape(name: str, shape: Shape) -> None:
    """Raise DataError for an input with other than one or three channels."""
    if shape[0] not in (1, 3):
        raise DataError(f"model.input has {shape[0]} channels; images of {name} give 1 (grey) or 3 (RGB)")


def check_statistics(key: str, values: Sequence[float] | None, channels: int) -> None:
    """Raise DataError unless the user's statistics have one value per channel."""
    if values is not None and len(values) != channels:
        raise DataError(f"{key} has {len(values)} values; model.input has {channels} channels")


def _recolour(pixels: Tensor, channels: int) -> Tensor:
    if pixels.shape[1] == channels:
        return pixels
    if pixels.shape[1] == 1:
        return pixels.expand(-1, channels, -1, -1)
    weights = torch.tensor(LUMA).view(1, 3, 1, 1)
    return (pixels * weights).sum(dim=1, keepdim=True).round().to(torch.uint8)


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    tall, wide = pixels.shape[-2:]
    if (tall, wide) == (height, width):
        return pixels
    scale = max(height / tall, width / wide)
    size = (max(height, round(tall * scale)), max(width, round(wide * scale)))
    resized = F.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[:, :, top : top + height, left : left + width].round().clamp(0, 255).to(torch.uint8)

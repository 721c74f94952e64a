"""Change training images at random: draw for a whole epoch at once, apply to whole batches on the device.

Every number is drawn on the CPU from (seed, epoch) and stored per image index. What happens to an image therefore
depends on (seed, epoch, index) alone: not on the device, the batch size, the workers, or where an epoch was resumed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dpm_cli.data.randomness import generator
from dpm_cli.errors import DataError
from dpm_cli.recipe.sections import Augment

AREA = (0.08, 1.0)  # of a resized crop, as a fraction of the image
ASPECT = (3 / 4, 4 / 3)  # of a resized crop, width over height


NO_CHANGE = Augment(crop=0, flip=False)


@dataclass(frozen=True)
class Draws:
    """The random numbers of some images; None where that change is off."""

    offset: Tensor | None  # (N, 2) int64, top and left of the crop in the padded image
    box: Tensor | None  # (N, 4) float32: area fraction, log aspect, vertical and horizontal place in [0, 1)
    flipped: Tensor | None  # (N,) bool
    hole: Tensor | None  # (N, 2) int64, row and column of the cutout's centre

    def of(self, index: Tensor) -> "Draws":
        """Select the draws of the images in `index` (B,)."""
        return Draws(*(None if each is None else each[index] for each in self._fields()))

    def to(self, device: torch.device) -> "Draws":
        """Copy the draws to a device."""
        return Draws(*(None if each is None else each.to(device) for each in self._fields()))

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.offset, self.box, self.flipped, self.hole


def draw_epoch(count: int, augment: Augment, *, height: int, width: int, seed: int, epoch: int) -> tuple[Tensor, Draws]:
    """Draw the order (N,) in which an epoch visits its images, and the random numbers of each image by index.

    Raises DataError for a padding or a cutout larger than the image.
    """
    for name, pixels in (("crop", augment.crop), ("cutout", augment.cutout)):
        if pixels > min(height, width):
            raise DataError(
                f"data.augment.{name} is {pixels} pixels; images of {height}x{width} allow no more than that"
            )
    source = generator("epoch", seed, epoch)
    order = torch.randperm(count, generator=source)  # (N,)
    offset = box = flipped = hole = None
    if augment.crop and not augment.resized_crop:
        offset = torch.randint(2 * augment.crop + 1, (count, 2), generator=source)
    if augment.resized_crop:
        box = torch.rand(count, 4, generator=source)
        box[:, 0].mul_(AREA[1] - AREA[0]).add_(AREA[0])
        box[:, 1].mul_(math.log(ASPECT[1] / ASPECT[0])).add_(math.log(ASPECT[0]))
    if augment.flip:
        flipped = torch.rand(count, generator=source) < 0.5
    if augment.cutout:
        rows = torch.randint(height, (count,), generator=source)
        columns = torch.randint(width, (count,), generator=source)
        hole = torch.stack([rows, columns], dim=1)
    return order, Draws(offset, box, flipped, hole)


def crop(pixels: Tensor, offset: Tensor, padding: int) -> Tensor:
    """Pad (B, C, H, W) with black and cut each image back to size at its own `offset` (B, 2), 0 to 2 * padding."""
    height, width = pixels.shape[-2:]
    windows = F.pad(pixels, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
    return windows[torch.arange(len(pixels), device=pixels.device), :, offset[:, 0], offset[:, 1]]


def flip(pixels: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the images of (B, C, H, W) for which `flipped` (B,) is true."""
    return torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)


def find_boxes(draws: Tensor, height: int, width: int) -> Tensor:
    """Turn draws (B, 4) into crops of an image of that size: top, left, height and width (B, 4) in pixels.

    A box longer than the image is shortened to it, where torchvision would draw again.
    """
    area, aspect = draws[:, 0] * height * width, draws[:, 1].exp()
    tall = (area / aspect).sqrt().clamp(max=height)
    wide = (area * aspect).sqrt().clamp(max=width)
    return torch.stack([draws[:, 2] * (height - tall), draws[:, 3] * (width - wide), tall, wide], dim=1)


def resized_crop(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Scale each image's box (B, 4; top, left, height, width) to the full size, bilinear: (B, C, H, W) float32."""
    size = torch.tensor(pixels.shape[-2:], dtype=torch.float32, device=pixels.device)  # (2,)
    scale = boxes[:, 2:] / size  # (B, 2), of y and x
    shift = (2 * boxes[:, :2] + boxes[:, 2:]) / size - 1  # (B, 2), in the coordinates of grid_sample
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    theta[:, 0, 0], theta[:, 1, 1] = scale[:, 1], scale[:, 0]
    theta[:, 0, 2], theta[:, 1, 2] = shift[:, 1], shift[:, 0]
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def cut_out_(images: Tensor, hole: Tensor, side: int) -> Tensor:
    """Zero a square around `hole` (B, 2) in each of (B, C, H, W), clipped at the border; after normalisation."""
    height, width = images.shape[-2:]
    top_left = hole - side // 2  # (B, 2)
    rows = torch.arange(height, device=images.device) - top_left[:, :1]  # (B, H)
    columns = torch.arange(width, device=images.device) - top_left[:, 1:]  # (B, W)
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]  # (B, H, W)
    return images.masked_fill_(inside[:, None], 0)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn pixels (B, C, H, W) of 0 to 255 into float32, minus `mean`, divided by `std` (C,) of pixels in [0, 1]."""
    scale = 1 / (255 * std)
    return pixels.float().mul(scale[:, None, None]).sub_((mean / std)[:, None, None])


def finish(pixels: Tensor, draws: Draws, augment: Augment, *, mean: Tensor, std: Tensor) -> Tensor:
    """Augment and normalise a batch (B, C, H, W) uint8, given its draws; `box` is None if it is done."""
    if draws.box is not None:
        pixels = resized_crop(pixels, find_boxes(draws.box, *pixels.shape[-2:]))
    if draws.offset is not None:
        pixels = crop(pixels, draws.offset, augment.crop)
    if draws.flipped is not None:
        pixels = flip(pixels, draws.flipped)
    images = normalise(pixels, mean, std)
    return images if draws.hole is None else cut_out_(images, draws.hole, augment.cutout)

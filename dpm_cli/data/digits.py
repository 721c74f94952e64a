"""Read the bundled digits: 1 797 real handwritten digits of 8x8 pixels (see DIGITS.md for source and licence)."""

import gzip
from importlib import resources

import numpy as np
import torch

from dpm_cli.data.arrays import Arrays

MEAN, STD = (0.3052,), (0.3760,)  # of the training pixels in [0, 1]
TEST_PART = 5  # every fifth image of each class, for every seed


def read_digits() -> tuple[Arrays, Arrays]:
    """Return training and test images (N, 1, 8, 8), 0 to 255."""
    packed = (resources.files("dpm_cli.data") / "digits.csv.gz").read_bytes()
    table = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",", dtype=np.int64)
    counts, labels = torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1].copy())
    pixels = (counts * 255 + 8) // 16  # 0 to 16 set pixels of a 4x4 block, rounded to 0 to 255
    images = Arrays(pixels.to(torch.uint8).view(-1, 1, 8, 8), labels)
    rank = torch.empty_like(labels)  # of each image within its class
    for label in range(10):
        members = labels == label
        rank[members] = torch.arange(int(members.sum()))
    is_test = rank % TEST_PART == TEST_PART - 1
    return images.select((~is_test).nonzero()[:, 0]), images.select(is_test.nonzero()[:, 0])

"""Define the small net of `dpm demo`. It learns 8×8 digits in seconds and has far more channels than it needs."""

import torch.nn.functional as F
from torch import Tensor, nn

from dpm_cli.models.resnet import BasicBlock, init_convolutions_


class DigitsNet(nn.Module):
    """A stem and two residual blocks of 32 and 64 channels.

    `forward` takes (B, channels, H, W) of any size and returns logits (B, classes).
    """

    def __init__(self, *, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.block1 = BasicBlock(32, 32, stride=1)
        self.block2 = BasicBlock(32, 64, stride=2)
        self.linear = nn.Linear(64, classes)
        init_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.block2(self.block1(x))  # (B, 64, H/2, W/2)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits

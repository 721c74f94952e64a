"""Define ResNets for CIFAR (He et al. 2016, §4.2) with option-B shortcuts.

They have 6n + 2 layers in three stages of n basic blocks.

Names follow the layout most published CIFAR weights use: conv1, bn1, layer1.0.conv1 …, layer2.0.shortcut.0 …, linear.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut; the shortcut is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-`depth` with stages of 16, 32 and 64 channels; depth is 6n + 2. ResNet-56: 855 770 parameters, 127 M MACs.

    `forward` takes (B, channels, H, W) of any size and returns logits (B, classes).
    """

    def __init__(self, depth: int, *, classes: int, channels: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, not {depth}")
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1, blocks=blocks)
        self.layer2 = _stage(16, 32, stride=2, blocks=blocks)
        self.layer3 = _stage(32, 64, stride=2, blocks=blocks)
        self.linear = nn.Linear(64, classes)
        init_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 64, H/4, W/4)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(inputs: int, outputs: int, *, stride: int, blocks: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def init_convolutions_(module: nn.Module) -> None:
    """Initialize every convolution as ReLU networks need (He et al. 2015)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

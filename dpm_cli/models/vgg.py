"""Define VGG with batch normalization (Simonyan & Zisserman 2015) for CIFAR.

It has five pooled stages and one linear classifier. Convolutions keep their bias, as in the layout that most published
CIFAR weights use: features.0 …, classifier.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dpm_cli.models.resnet import init_convolutions_

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # per stage


class CifarVGG(nn.Module):
    """VGG-16 or VGG-19. VGG-16: 14 728 266 parameters, 313 M MACs.

    `forward` takes (B, channels, H, W) of 32×32 or larger and returns logits (B, classes).
    """

    def __init__(self, depth: int, *, classes: int, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential()
        inputs = channels
        for width, convolutions in zip(WIDTHS, CONVOLUTIONS[depth]):
            for _ in range(convolutions):
                self.features.append(nn.Conv2d(inputs, width, 3, padding=1))
                self.features.append(nn.BatchNorm2d(width))
                self.features.append(nn.ReLU(inplace=True))
                inputs = width
            self.features.append(nn.MaxPool2d(2))
        self.classifier = nn.Linear(inputs, classes)
        init_convolutions_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)  # (B, 512, 1, 1)
        logits: Tensor = self.classifier(x.flatten(1))
        return logits

"""Pictures that the slim model gets wrong: what people look at says something about all classes."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpm_cli.data.splits import Images, Splits
from dpm_cli.run.mistakes import MOST, find_mistakes

CLASSES, EACH = 5, 300


class Reader(nn.Module):
    """Reads the label from the pixels, plus a shift."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, images: Tensor) -> Tensor:
        labels = (images.mean((1, 2, 3)) * 255).round().long() + self.shift
        return 9.0 * functional.one_hot(labels % CLASSES, CLASSES)


def test_mistakes_come_from_all_classes_of_a_folder_in_order() -> None:
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    pixels = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    images = Images(pixels, labels, mean=torch.zeros(3), std=torch.ones(3))
    names = tuple("abcde")
    splits = Splits(images, images, images, CLASSES, (3, 8, 8), names, mean=(0.0,) * 3, std=(1.0,) * 3)
    found = list(find_mistakes(Reader(0), Reader(1), splits, batch=64))
    assert len(found) == MOST
    assert len({each.label for each in found}) >= 4
    assert all(each.label == names[each.image // EACH] for each in found)  # the number is that of the image
    assert all(each.slim == names[(each.image // EACH + 1) % CLASSES] for each in found)

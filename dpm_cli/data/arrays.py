"""Hold small images as a dataset's own files give them, before they are made to fit a model."""

from dataclasses import dataclass

from torch import Tensor

from dpm_cli.errors import DataError


@dataclass(frozen=True)
class Arrays:
    """One split on the CPU, at its native size."""

    pixels: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.pixels)

    def select(self, index: Tensor) -> "Arrays":
        """Select the images of `index` (M,), in that order."""
        return Arrays(self.pixels[index], self.labels[index])


def check_classes(name: str, labels: Tensor, names: tuple[str, ...], classes: int) -> None:
    """Raise DataError unless the dataset has that number of classes and every label (N,) is one of them."""
    if len(names) != classes:
        raise DataError(f"{name} has {len(names)} classes but model.classes is {classes}; set it to {len(names)}")
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        label = int(labels[index])
        raise DataError(f"{name} has label {label} at image {index}; labels are 0 to {classes - 1}: repair the file")

"""The shape of one image, and how a picture of any size is brought to it."""

from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, int, int]  # channels, height, width
Crop = Literal["center", "none"]


@dataclass(frozen=True)
class Framing:
    """Says how pictures are brought to the size of a model's input, always bilinearly.

    By default a picture is scaled until it just covers the input, and its centre is kept. resize: scale its short side
    to this many pixels before, as torchvision's classifiers do (256 for an input of 224). crop "none": squeeze the
    whole picture into the input, whatever its aspect.
    """

    shape: Shape
    resize: int | None = None
    crop: Crop = "center"

    @property
    def is_usual(self) -> bool:
        return self.resize is None and self.crop == "center"

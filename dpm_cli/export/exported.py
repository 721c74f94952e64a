"""A deployed file, opened."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dpm_cli.errors import RunError, UsageError
from dpm_cli.layers.images import Shape


@dataclass(frozen=True)
class ExportedModel:
    """A model file that runs on the CPU: `model(images (B, C, H, W) float32) -> logits (B, classes)`."""

    format: str
    path: Path
    metadata: Mapping[str, str]
    shape: Shape | None  # (C, H, W) of one image; none: a foreign file that does not say
    outputs: Callable[[Tensor], list[Tensor]]  # every output, in order

    def __call__(self, images: Tensor) -> Tensor:
        """The first output, on the device of the images. Raises UsageError if they have the wrong shape."""
        if images.ndim != 4 or (self.shape is not None and tuple(images.shape[1:]) != self.shape):
            wanted = ", ".join(map(str, ("batch", *(self.shape or ("channels", "height", "width")))))
            raise UsageError(f"{self.path} takes images of shape ({wanted}), not {tuple(images.shape)}")
        outputs = self.outputs(images)
        if not outputs:
            raise RunError(f"{self.path} returns no tensor, so it cannot be a classifier")
        return outputs[0].to(images.device)


def parse_extra(extra: str | bytes) -> tuple[dict[str, str], Shape | None]:
    """The metadata and the shape of one image that lie beside the code in an archive; nothing in a foreign file."""
    if not extra:
        return {}, None
    content = json.loads(extra)
    channels, height, width = content["shape"]
    return {str(key): str(value) for key, value in content["metadata"].items()}, (
        int(channels),
        int(height),
        int(width),
    )

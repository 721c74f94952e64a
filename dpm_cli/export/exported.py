"""Run a deployed file that is open."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dpm_cli.errors import RunError, UsageError
from dpm_cli.layers.images import Shape
from dpm_cli.measure import read_clocks

EXTRA = "dpm.json"  # in archives of TorchScript and torch.export: the metadata and the shape of one image


@dataclass(frozen=True)
class ExportedModel:
    """A model file that runs on the CPU: `model(images (B, C, H, W) float32) -> logits (B, classes)`."""

    format: str
    path: Path
    metadata: Mapping[str, str]
    shape: Shape | None  # (C, H, W) of one image; None if a foreign file does not say
    outputs: Callable[[Tensor], list[Tensor]]  # every output, in order
    cost: Callable[[Shape], tuple[int | None, int | None]]  # image shape -> MACs and weights, where they can be counted
    read_clocks: Callable[[], tuple[float, float]] = read_clocks  # as `Clocked`: of the process that it runs in

    def __call__(self, images: Tensor) -> Tensor:
        """Return the first output, on the device of the images. Raises UsageError if they have the wrong shape."""
        if images.ndim != 4 or (self.shape is not None and tuple(images.shape[1:]) != self.shape):
            wanted = ", ".join(map(str, ("batch", *(self.shape or ("channels", "height", "width")))))
            raise UsageError(f"{self.path} takes images of shape ({wanted}), not {tuple(images.shape)}")
        outputs = self.outputs(images)
        if not outputs:
            raise RunError(f"{self.path} returns no tensor, so it cannot be a classifier")
        return outputs[0].to(images.device)


def parse_extra(extra: str | bytes) -> tuple[dict[str, str], Shape | None]:
    """Read the metadata and the image shape beside the code in an archive; a foreign file has neither."""
    if not extra:
        return {}, None
    content = json.loads(extra)
    channels, height, width = content["shape"]
    return {str(key): str(value) for key, value in content["metadata"].items()}, (
        int(channels),
        int(height),
        int(width),
    )

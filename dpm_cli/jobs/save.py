"""Save a model that your own loop has pruned as slim.pt."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_cli.errors import UsageError
from dpm_cli.layers.images import Crop, Framing, Shape
from dpm_cli.layers.modes import in_mode
from dpm_cli.method.pruner import find_origin
from dpm_cli.models import Metadata, save_slim
from dpm_cli.models.metadata import printable_names


def save(
    model: nn.Module,
    path: str | Path,
    *,
    arch: str | None = None,
    dense: nn.Module | None = None,
    shape: Shape | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    names: Sequence[str] = (),
    resize: int | None = None,
    crop: Crop = "center",
) -> None:
    """Write a pruned classifier as slim.pt. The file is reloaded and compared before it gets its name.

        dpm_cli.save(model, "slim.pt", arch="torchvision:resnet18")
        module = dpm_cli.load("slim.pt")

    arch: what builds the dense module, as `model.arch` in a recipe. Without it, `load` and `export_slim` will need a
    freshly built dense module as `model`. dense, shape: such a module, and channels, height and width of one image;
    needed for a model that no Pruner of this process has pruned. mean, std: of the pixels per channel, 0 and 1 by
    default; names: of the classes; resize, crop: how your pictures were brought to size, as `data.resize` and
    `data.crop` in a recipe. All of it is stored, and `dpm predict` and every export rely on it.

    Raises UsageError, UnsupportedModelError or RunError, each in one line.
    """
    origin = find_origin(model)
    if origin is None and (shape is None or (dense is None and arch is None)):
        raise UsageError(
            "the model was not pruned by a Pruner of this process: give arch, or dense (a freshly built dense module), "
            "and shape (channels, height and width of one image)"
        )
    if origin is not None:
        shape, dense = shape or origin.shape, dense if dense is not None else origin.dense
    if shape is None:
        raise UsageError("the Pruner's example is not one batch of images (B, C, H, W): slim.pt holds classifiers only")
    slim = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval()
    save_slim(
        Path(path),
        slim,
        metadata=Metadata(
            classes=_count_classes(slim, shape, names),
            framing=Framing(shape, resize, crop),
            mean=tuple(mean) if mean is not None else (0.0,) * shape[0],
            std=tuple(std) if std is not None else (1.0,) * shape[0],
            names=printable_names(names),
            arch=arch,
        ),
        recipe="",
        report={},
        dense=dense if arch is None else None,
    )


def _count_classes(model: nn.Module, shape: Shape, names: Sequence[str]) -> int:
    with in_mode(model, training=False), torch.no_grad():
        outputs = model(torch.zeros(1, *shape))
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        kind = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UsageError(f"the model returns {kind}, not one row of logits per image: slim.pt holds classifiers only")
    if len(names) not in (0, outputs.shape[1]):
        raise UsageError(f"names are {len(names)}, but the model gives {outputs.shape[1]} logits: name every class")
    return outputs.shape[1]

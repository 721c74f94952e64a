"""Export one file of a slim model, as runs and `dpm export` do, with the images that int8 is made from."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_cli.data import Splits
from dpm_cli.data.splits import sample
from dpm_cli.errors import DataError
from dpm_cli.export import Calibration, Format, export_int8, export_model
from dpm_cli.recipe import Recipe
from dpm_cli.report import ExportedFile

EXPORT_NAMES: dict[Format, str] = {
    "torchscript": "model.ts",
    "onnx": "model.onnx",
    "onnx-fp16": "model.fp16.onnx",
    "onnx-int8": "model.int8.onnx",
    "pt2": "model.pt2",
    "openvino": "model.xml",
    "executorch": "model.pte",
}

# Formats whose accuracy and latency are measured for themselves.
OWN_RUNTIMES = {
    "onnx-int8": "onnxruntime",
    "executorch": "executorch",
}


def export_one(
    slim: nn.Module,
    image: Tensor,
    format: Format,
    folder: Path,
    *,
    metadata: Mapping[str, str],
    opset: int,
    calibration: Calibration | None,
) -> ExportedFile:
    """Write one file under its usual name, reload it and compare. image: (1, C, H, W)

    calibration: needed for onnx-int8. Raises RunError, or AccuracyError if int8 costs more than allowed.
    """
    path = folder / EXPORT_NAMES[format]
    if format == "onnx-int8":
        assert calibration is not None
        made = export_int8(slim, image, path=path, metadata=metadata, calibration=calibration, opset=opset)
    else:
        made = export_model(slim, image, format=format, path=path, metadata=metadata, opset=opset)
    described = ExportedFile(format, str(made.path), made.bytes, made.max_difference)
    if made.quantized is None:
        return described
    return replace(
        described, agreement=made.quantized.agreement, drop=made.quantized.drop, kept=list(made.quantized.kept)
    )


def make_calibration(recipe: Recipe, splits: Splits) -> Calibration:
    """Draw the calibration images from the training images by the seed of the recipe.

    Validation images judge the result. Raises DataError if there are none of either.
    """
    count = min(recipe.quantize.images, len(splits.train))
    if not count or not len(splits.validation):
        missing = "validation" if count else "training"
        raise DataError(f"there are no {missing} images to quantize with: check data.root, or leave out onnx-int8")
    some = splits.train.select(sample(len(splits.train), count, seed=recipe.seed))
    batch = recipe.data.batch
    images = [images.cpu() for images, _ in some.batches(batch, seed=0, epoch=0, augment=None)]
    return Calibration(
        torch.cat(images),
        lambda: splits.validation.batches(batch, seed=0, epoch=0, augment=None),
        splits.labelled,
        recipe.quantize,
    )

"""`dpm export`: export a slim.pt for deployment, without the run that made it."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dpm_cli.errors import DataError, OutputError, UsageError
from dpm_cli.export import Calibration, require_format
from dpm_cli.files import (
    MARKS,
    METADATA,
    parts_of,
    read_regular_text,
    require_apart,
    require_ours,
    require_writable,
    write_text_atomic,
)
from dpm_cli.jobs.loading import AnyRecipe, load_splits, resolve_recipe
from dpm_cli.models import Slim, load_slim
from dpm_cli.recipe import Recipe, read_recipe
from dpm_cli.report import ExportedFile
from dpm_cli.run.exporting import EXPORT_NAMES, export_one, make_calibration


def export_slim(
    slim: str | Path,
    *,
    formats: Sequence[str] = ("torchscript", "onnx"),
    output: str | Path = ".",
    overwrite: bool = False,
    arch: str | None = None,
    model: nn.Module | None = None,
    opset: int = 18,
    recipe: AnyRecipe | None = None,
    overrides: Sequence[str] = (),
    trust: bool = False,
) -> list[ExportedFile]:
    """Export a slim.pt, without the run that made it.

        dpm_cli.export_slim("slim.pt", formats=["onnx"], output="deploy")

    formats: torchscript, onnx, onnx-fp16, onnx-int8, pt2, openvino, executorch. arch: needed for architectures from
    your own code. model: a freshly built dense module, for a file that was saved without an architecture. opset: of
    ONNX. Every file is reloaded and compared before it gets its name.

    recipe, overrides: `data` and `quantize` for onnx-int8, and changes such as "data.root=photos"; by default, the
    recipe in slim.pt. trust: run code that this recipe names for its data, and accept images far larger than the file.
    Raises AccuracyError if int8 costs more than `quantize.max_drop`; other files are then written.
    """
    for format in formats:
        if format not in EXPORT_NAMES:
            raise UsageError(f"export format {format!r} is not known; known: {', '.join(EXPORT_NAMES)}")
        require_format(format)
    loaded, folder = load_slim(Path(slim), arch, model=model, trust=trust), Path(output)
    require_writable(folder)
    paths = {known: folder / name for known, name in EXPORT_NAMES.items() if known in formats}
    parts = [part for path in paths.values() for part in parts_of(path)]
    there = {path: MARKS[path.name] for path in parts if os.path.lexists(path)}
    for path in there:
        if not overwrite:
            raise OutputError(f"{path} exists: choose another --output, or --overwrite to replace it")
    require_apart({"the slim model": slim}, there, folder)
    beside, described = folder / METADATA, loaded.metadata.to_json()
    if os.path.lexists(beside):
        there[beside] = MARKS[METADATA]
    require_ours(there)
    if beside in there and not overwrite and read_regular_text(beside) != described:
        raise OutputError(f"{beside} exists and describes another model: choose another --output, or --overwrite")
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *loaded.shape, generator=generator)
    calibration = _load_calibration(Path(slim), loaded, recipe, overrides, trust) if "onnx-int8" in paths else None
    write_text_atomic(beside, described)
    metadata = loaded.metadata.to_strings()
    return [
        export_one(loaded.module, image, format, folder, metadata=metadata, opset=opset, calibration=calibration)
        for format in sorted(paths, key="onnx-int8".__eq__)  # the one that may fail comes last
    ]


def _load_calibration(
    path: Path, slim: Slim, recipe: AnyRecipe | None, overrides: Sequence[str], trust: bool
) -> Calibration:
    """Load the images to quantize with. Raises DataError, with the way out, if they are missing."""
    if recipe is not None:
        settings = resolve_recipe(recipe, trust=trust)
    elif slim.recipe:
        settings = resolve_recipe(read_recipe(slim.recipe, overrides, name=f"the recipe in {path}"), trust=trust)
    else:
        raise UsageError(f"{path} holds no recipe, so onnx-int8 does not know its calibration images: give --recipe")
    _require_same_images(settings, slim, path)
    try:
        splits = load_splits(settings, torch.device("cpu"))
    except DataError as error:
        raise DataError(
            f"onnx-int8 needs training images to calibrate on: {error}; give --recipe, or --set data.root=FOLDER"
        ) from error
    return make_calibration(settings, splits)


def _require_same_images(recipe: Recipe, slim: Slim, path: Path) -> None:
    """Check that the images have the shape and the classes of the model. Raises UsageError."""
    given, wanted = (tuple(recipe.model.input), recipe.model.classes), (tuple(slim.shape), slim.classes)
    if given != wanted:
        raise UsageError(
            f"the recipe has images of {list(given[0])} in {given[1]} classes, {path} takes {list(wanted[0])} in "
            f"{wanted[1]}: give a recipe for the same images"
        )

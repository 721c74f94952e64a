"""`dpm predict`: the answer of a deployed file for pictures, by the metadata in the file alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.data.decode import decode
from dpm_cli.errors import DataError, ModelFileError, UnreadableError, UsageError, listing, one_line
from dpm_cli.files import read_regular_text
from dpm_cli.jobs.loading import open_deployed
from dpm_cli.models.metadata import COLORS, Metadata, parse_metadata, parse_strings
from dpm_cli.models.read import read_model_file
from dpm_cli.models.slim import rebuild
from dpm_cli.models.slim_content import Content, is_slim, parse_content
from dpm_cli.results import Guess, Predicted
from dpm_cli.tasks.classification import main_output

BATCH = 32  # pictures decoded and run at once


def predict(
    file: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    arch: str | None = None,
    model: nn.Module | None = None,
    trust: bool = False,
) -> list[Predicted]:
    """Say what a deployed file sees in pictures, on the CPU: the `top` classes of each, most probable first.

        dpm_cli.predict("out/model.onnx", ["cat.jpg"])[0].classes[0].name

    file: a slim.pt, TorchScript, ONNX or .pt2 file of this package, whose metadata say how a picture becomes its input.
    arch, model: for a slim.pt of your own code, as for `load`.
    Raises ModelFileError for a file without metadata or with newer ones, UnreadableError with the results of the others
    if pictures cannot be read.
    """
    if top < 1:
        raise UsageError(f"top is {top}; at least one class can be shown")
    if not images:
        raise UsageError("no picture was given: name at least one image file")
    run, metadata = _open(Path(file), arch, model, trust)
    if metadata.framing.shape[0] not in COLORS:
        raise UsageError(f"{file} takes {metadata.framing.shape[0]} channels; pictures have 1 (grey) or 3 (RGB)")
    predicted: list[Predicted] = []
    for first in range(0, len(images), BATCH):
        inputs = [_try_to_prepare(image, metadata) for image in images[first : first + BATCH]]
        readable = [each for each in inputs if isinstance(each, Tensor)]
        chances = iter(_run(run, torch.stack(readable), metadata, Path(file)) if readable else ())
        for image, each in zip(images[first:], inputs):
            seen = () if isinstance(each, DataError) else _name(next(chances), metadata, top)
            predicted.append(Predicted(str(image), seen, str(each) if isinstance(each, DataError) else None))
    unreadable = [each.error for each in predicted if each.error]
    if unreadable:
        raise UnreadableError(listing(unreadable), predicted=predicted)
    return predicted


def read_metadata(file: str | Path, *, trust: bool = False) -> Metadata:
    """Read what a slim.pt, an exported file or the model.json beside them says about itself. Raises ModelFileError.

    dpm_cli.read_metadata("out/model.onnx").names
    """
    path = Path(file)
    if path.suffix == ".json":
        try:
            return parse_metadata(json.loads(read_regular_text(path)), path)
        except (OSError, ValueError, RecursionError) as error:
            raise ModelFileError(f"{path} cannot be read: {one_line(error)}") from None
    exported = open_deployed(path, trust)
    return parse_strings(exported.metadata, path) if exported else _read_slim(path).metadata


def prepare(image: str | Path, metadata: Metadata) -> Tensor:
    """Turn a picture into an input (C, H, W) as the metadata say. Raises DataError if it cannot be read.

    metadata = dpm_cli.read_metadata("out/slim.pt")
    logits = dpm_cli.load("out/slim.pt")(dpm_cli.prepare("photo.jpg", metadata)[None])  # (1, classes)
    """
    pixels = torch.from_numpy(np.array(decode(str(image), metadata.framing)))  # (C, H, W) uint8
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (metadata.mean, metadata.std))
    return (pixels.float() / 255 - mean) / std


def _try_to_prepare(image: str | Path, metadata: Metadata) -> Tensor | DataError:
    try:
        if not Path(image).is_file():
            raise DataError(f"{image} is not a file")
        return prepare(image, metadata)
    except DataError as error:
        return error


def _open(
    path: Path, arch: str | None, model: nn.Module | None, trust: bool
) -> tuple[Callable[[Tensor], object], Metadata]:
    exported = open_deployed(path, trust)
    if exported:
        return exported, parse_strings(exported.metadata, path)
    slim = rebuild(_read_slim(path), path, arch, model=model, trust=trust)
    return slim.module, slim.metadata


def _read_slim(path: Path) -> Content:
    content = read_model_file(path)
    if not is_slim(content):
        raise ModelFileError(
            f"{path} holds weights only, which do not say how a picture becomes an input: give a slim.pt, or a file "
            "that was exported from one"
        )
    return parse_content(content, path)


def _run(run: Callable[[Tensor], object], images: Tensor, metadata: Metadata, path: Path) -> Tensor:
    """Return probabilities (B, classes). Raises ModelFileError for another number of outputs."""
    with torch.inference_mode():
        logits = main_output(run(images), images=len(images)).float()  # (B, classes)
    if logits.shape != (len(images), metadata.classes):
        raise ModelFileError(
            f"{path} gives outputs {list(logits.shape)} for {len(images)} pictures, but its metadata say "
            f"{metadata.classes} classes: export it again"
        )
    if not bool(logits.isfinite().all()):
        raise ModelFileError(
            f"{path} gives outputs that are NaN or infinite: it is damaged, or was trained until it broke"
        )
    return logits.softmax(1)


def _name(chances: Tensor, metadata: Metadata, top: int) -> tuple[Guess, ...]:
    best = chances.topk(min(top, len(chances)))
    guesses = zip(best.indices.tolist(), best.values.tolist())
    return tuple(Guess(metadata.name_of(index), index, chance) for index, chance in guesses)

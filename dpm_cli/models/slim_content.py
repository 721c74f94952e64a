"""The dict inside a slim.pt, checked: it may come from anyone.

By hand, which stops at the first wrong value. Pydantic collects them all: a million of them in a small file
take it 18 s and 2 GB.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpm_cli.errors import ModelFileError
from dpm_cli.layers.images import Framing, Shape
from dpm_cli.models.metadata import Metadata, parse_metadata
from dpm_cli.models.packed import Packed, shape_of
from dpm_cli.models.structure import Edits
from dpm_cli.models.weights import require_tensors
from dpm_cli.recipe.code import is_own_code
from dpm_cli.recipe.sections import MAX_NUMBERS

FORMAT = "dpm-slim"
VERSION = 2  # 2: with packed weights
MAX_TEXT = 1 << 22  # characters of recipe, report and metadata, each


@dataclass(frozen=True)
class Content:
    """What stands in a slim.pt, before its module is rebuilt."""

    arch: str | None
    classes: int
    shape: Shape
    edits: Edits
    state_dict: dict[str, Tensor]  # packed weights are there by their shapes alone, on the meta device
    packed: dict[str, Packed]
    buffers: dict[str, Tensor]
    frozen: frozenset[str]
    recipe: str
    report: dict[str, Any]
    metadata: Metadata


def is_slim(content: object) -> bool:
    """Whether what a file holds was written by `save_slim` of any version."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def parse_content(content: Any, path: Path) -> Content:
    """Check every value. Raises ModelFileError that names the first that is not as it must be."""
    if not is_slim(content):
        raise ModelFileError(f"{path} is not a slim.pt: `dpm prune` writes them")
    version = content.get("version")
    if type(version) is int and version > VERSION:
        raise ModelFileError(
            f"{path} has format version {version}, this dpm reads {VERSION}: update it, pip install -U dpm-cli"
        )
    if type(version) is not int or version < 1:
        raise _damaged(path, "version")
    arch, classes, recipe = content.get("arch"), content.get("classes"), content.get("recipe")
    if arch is not None and not (isinstance(arch, str) and arch.isprintable() and 0 < len(arch) <= 200):
        raise _damaged(path, "arch")
    if type(classes) is not int or not 1 <= classes <= 10**6:
        raise _damaged(path, "classes")
    if not isinstance(recipe, str) or len(recipe) > MAX_TEXT:
        raise _damaged(path, "recipe")
    shape = _parse_shape(content.get("shape"), path)
    packed = _parse_packed(content.get("packed", {}), path)
    shapes = {name: _describe_packed(parts, path) for name, parts in packed.items()}
    state_dict = _parse_tensors(content, "state_dict", path) | shapes
    if arch is not None and not is_own_code(arch):
        _require_as_many_classes(state_dict, classes, path)
    return Content(
        arch=arch,
        classes=classes,
        shape=shape,
        edits=_parse_edits(content.get("edits"), path),
        state_dict=state_dict,
        packed=packed,
        buffers=_parse_tensors(content, "buffers", path),
        frozen=_parse_frozen(content.get("frozen"), path),
        recipe=recipe,
        report=_parse_json(content.get("report"), "report", path),
        metadata=_parse_metadata(content, arch, classes, shape, path),
    )


def _damaged(path: Path, key: str) -> ModelFileError:
    return ModelFileError(f"{path} is damaged: {key!r} is not as dpm writes it; copy it again or prune again")


def _parse_shape(value: object, path: Path) -> Shape:
    if not isinstance(value, list) or len(value) != 3 or not all(type(n) is int and 1 <= n <= 8192 for n in value):
        raise _damaged(path, "shape")
    channels, height, width = value
    if channels * height * width > MAX_NUMBERS:  # a small file cannot ask for the memory of a huge image
        raise _damaged(path, "shape")
    return channels, height, width


def _parse_edits(value: object, path: Path) -> Edits:
    """Names and values are checked against the architecture later, by `apply_edits_`."""
    if not isinstance(value, dict):
        raise _damaged(path, "edits")
    for name, sizes in value.items():
        if not isinstance(name, str) or not isinstance(sizes, dict):
            raise _damaged(path, "edits")
        for attribute, size in sizes.items():
            numbers = size if isinstance(size, list) else [size]
            if not isinstance(attribute, str) or not all(type(number) is int for number in numbers):
                raise _damaged(path, "edits")
    return value


def _parse_tensors(content: dict[str, Any], key: str, path: Path) -> dict[str, Tensor]:
    if not isinstance(content.get(key), dict):
        raise _damaged(path, key)
    return require_tensors(content[key], path)


def _parse_packed(value: object, path: Path) -> dict[str, Packed]:
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(packed, dict) for name, packed in value.items()
    ):
        raise _damaged(path, "packed")
    return {name: require_tensors(packed, path) for name, packed in value.items()}


def _describe_packed(packed: Packed, path: Path) -> Tensor:
    """Compare the sizes of all parts; nothing is unpacked before the shape is compared with the architecture."""
    try:
        return torch.empty(shape_of(packed), dtype=packed["values"].dtype, device="meta")
    except (ValueError, RuntimeError, TypeError):  # whatever torch says about wrong sizes and types
        raise _damaged(path, "packed") from None


def _require_as_many_classes(state_dict: dict[str, Tensor], classes: int, path: Path) -> None:
    """The classifier is never pruned: a small file cannot ask for the memory of a million classes."""
    if not any(tensor.dim() and tensor.shape[0] == classes for tensor in state_dict.values()):
        raise _damaged(path, "classes")


def _parse_frozen(value: object, path: Path) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _damaged(path, "frozen")
    return frozenset(value)


def _parse_json(value: object, key: str, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) and len(value) <= MAX_TEXT else None
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise _damaged(path, key)
    return parsed


def _parse_metadata(content: dict[str, Any], arch: str | None, classes: int, shape: Shape, path: Path) -> Metadata:
    """Read the metadata; what a slim.pt says twice is taken from the other place. Early versions hold no names."""
    mean, std = (_parse_pixels(content, key, shape[0], path) for key in ("mean", "std"))
    if "metadata" not in content:
        return Metadata(classes, Framing(shape), mean, std, arch=arch, dpm="")
    metadata = parse_metadata(_parse_json(content["metadata"], "metadata", path), path)
    names = metadata.names if len(metadata.names) == classes else ()
    framing = replace(metadata.framing, shape=shape)
    return replace(metadata, arch=arch, classes=classes, framing=framing, mean=mean, std=std, names=names)


def _parse_pixels(content: dict[str, Any], key: str, channels: int, path: Path) -> tuple[float, ...]:
    value = content.get(key)
    if (
        not isinstance(value, list)
        or len(value) != channels
        or not all(isinstance(number, float) and math.isfinite(number) for number in value)
        or (key == "std" and min(value) <= 0)
    ):
        raise _damaged(path, key)
    return tuple(value)

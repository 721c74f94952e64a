"""What a deployed file says about itself: the names of its classes, and how a picture becomes its input.

Every exported file, slim.pt and model.json hold the same values. Formats that only hold text, such as ONNX, hold the
JSON of each; text as it is.

    version                     1
    dpm, arch, dpm_recipe       what made the file
    task, classes, names        names are in the order of the outputs, [] if nobody gave any
    input                       [channels, height, width]
    color, range                "RGB" or "L" (grey); [0, 1]: pixels are divided by 255 first
    resize, crop, interpolation see `Framing`
    mean, std                   subtracted, then divided by, per channel
"""

import importlib.metadata
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpm_cli.errors import ModelFileError
from dpm_cli.layers.images import Framing

VERSION = 1
TASK = "classification"
COLORS = {1: "L", 3: "RGB"}
MOST_NAMES, LONGEST_NAME = 10**5, 1000
MOST_TEXT = 1 << 22  # characters of one value


def _own_version() -> str:
    try:
        return importlib.metadata.version("dpm-cli")
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Metadata:
    """Says all that predictions need besides the model itself."""

    classes: int
    framing: Framing
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    names: tuple[str, ...] = ()  # of the classes, in the order of the outputs; empty if they have none
    arch: str | None = None
    recipe_hash: str = ""
    dpm: str = field(default_factory=_own_version)  # the version that wrote the file

    def name_of(self, index: int) -> str:
        """Return the name of a class, or its index if it has none."""
        return self.names[index] if self.names else str(index)

    def to_dict(self) -> dict[str, Any]:
        """Return what model.json holds."""
        channels, height, width = self.framing.shape
        return {
            "version": VERSION,
            "dpm": self.dpm,
            "arch": self.arch or "",
            "dpm_recipe": self.recipe_hash,
            "task": TASK,
            "classes": self.classes,
            "names": list(self.names),
            "input": [channels, height, width],
            "color": COLORS.get(channels, ""),
            "range": [0, 1],
            "resize": self.framing.resize,
            "crop": self.framing.crop,
            "interpolation": "bilinear",
            "mean": list(map(float, self.mean)),
            "std": list(map(float, self.std)),
        }

    def to_json(self) -> str:
        """Return the text of model.json."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def to_strings(self) -> dict[str, str]:
        """Return what formats hold that know text only: the JSON of every value, or the text itself."""
        return {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in self.to_dict().items()
        }


def printable_names(names: Iterable[str]) -> tuple[str, ...]:
    """Replace what no text file can hold: names of folders may be any bytes."""
    return tuple(os.fsencode(name).decode(errors="replace")[:LONGEST_NAME] for name in names)


def parse_strings(strings: Mapping[str, str], path: Path) -> Metadata:
    """Read what `to_strings` wrote. Raises ModelFileError if it is missing, damaged or of a newer version."""
    if "version" not in strings or "input" not in strings:
        raise ModelFileError(
            f"{path} does not say how a picture becomes its input: export it again from its slim.pt, with dpm export"
        )
    texts = ("dpm", "arch", "dpm_recipe", "task", "color", "crop", "interpolation")
    if long := next((key for key, text in strings.items() if key in _KEYS and len(text) > MOST_TEXT), None):
        raise _damaged(path, long)
    try:
        values = {key: text if key in texts else json.loads(text) for key, text in strings.items() if key in _KEYS}
    except (ValueError, RecursionError):
        raise _damaged(path, "JSON") from None
    return parse_metadata(values, path)


def parse_metadata(values: object, path: Path) -> Metadata:
    """Read what `to_dict` wrote. Raises ModelFileError for anything else: the file may come from anyone."""
    if not isinstance(values, dict):
        raise _damaged(path, "metadata")
    version = values.get("version")
    if type(version) is int and version > VERSION:
        raise ModelFileError(
            f"{path} has metadata of version {version}, this dpm reads {VERSION}: update it, pip install -U dpm-cli"
        )
    if version != VERSION:
        raise _damaged(path, "version")
    if values.get("task") != TASK:
        raise ModelFileError(f"{path} is for the task {str(values.get('task'))[:40]!r}; known: {TASK}")
    for key, is_right in _CHECKS.items():
        if not is_right(values.get(key)):
            raise _damaged(path, key)
    shape, classes, names = values["input"], values["classes"], values["names"]
    if len(names) not in (0, classes):
        raise _damaged(path, "names")
    for key in ("mean", "std"):
        if len(values[key]) != shape[0]:
            raise _damaged(path, key)
    if values["color"] != COLORS.get(shape[0], "") or values["range"] != [0, 1]:
        raise _damaged(path, "color")
    channels, height, width = shape
    return Metadata(
        classes=classes,
        framing=Framing((channels, height, width), values["resize"], values["crop"]),
        mean=tuple(map(float, values["mean"])),
        std=tuple(map(float, values["std"])),
        names=tuple(names),
        arch=values["arch"] or None,
        recipe_hash=values["dpm_recipe"],
        dpm=values["dpm"],
    )


def _damaged(path: Path, key: str) -> ModelFileError:
    return ModelFileError(f"{path} has damaged metadata ({key!r} is not as dpm writes it): export it again")


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= 8192


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_NAME


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(each) in (int, float) and math.isfinite(each) for each in value)


_CHECKS = {
    "classes": lambda value: type(value) is int and 1 <= value <= MOST_NAMES,
    "names": lambda value: isinstance(value, list) and len(value) <= MOST_NAMES and all(map(_is_text, value)),
    "input": lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_size, value)),
    "range": _are_numbers,
    "resize": lambda value: value is None or _is_size(value),
    "crop": lambda value: value in ("center", "none"),
    "interpolation": lambda value: value == "bilinear",
    "mean": _are_numbers,
    "std": lambda value: _are_numbers(value) and min(value, default=0) > 0,
    "arch": _is_text,
    "dpm_recipe": _is_text,
    "dpm": _is_text,
    "color": _is_text,
}
_KEYS = {"version", "task", *_CHECKS}

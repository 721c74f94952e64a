"""Load a model file into the recipe's architecture: a module that is ready to be pruned."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpm_cli.errors import DpmError, ModelFileError, one_line
from dpm_cli.layers.images import Shape
from dpm_cli.models.outputs import compare, find_failure
from dpm_cli.models.read import read_model_file
from dpm_cli.models.sketch import sketch
from dpm_cli.models.slim import TOLERANCE, rebuild
from dpm_cli.models.slim_content import Content, is_slim, parse_content
from dpm_cli.models.structure import Edits, apply_edits_, find_edits, named_tensors
from dpm_cli.models.weights import (
    find_weights,
    load_weights_,
    require_fit,
    require_sound,
    require_tensors,
    strip_wrappers,
)
from dpm_cli.models.zoo import auxiliary_heads, build


@dataclass(frozen=True)
class Loaded:
    """A module in eval mode on the CPU, and what its file says about its past."""

    module: nn.Module
    edits: Edits = field(default_factory=dict)  # empty for a dense module
    recipe: str | None = None  # of the run that made it, as YAML
    report: dict[str, Any] | None = None
    ignored: tuple[str, ...] = ()  # weights in the file that only training needs: auxiliary heads


def load_model(path: str | Path, *, arch: str, classes: int, shape: Shape, trust: bool = False) -> Loaded:
    """Load a state dict, a .safetensors file, an earlier slim.pt or, trusted, a pickled module.

    Weights always go into a module built from `arch`, so what is pruned can be rebuilt later. Nothing in the file is
    executed unless `trust`. Raises ModelFileError, or RecipeError if `arch` cannot be built.
    """
    path = Path(path)
    content = read_model_file(path, trust=trust)
    if is_slim(content):
        return _load_earlier(parse_content(content, path), path, arch, classes, shape, trust)
    weights = find_weights(content, path)
    if isinstance(weights, nn.Module):
        return _adopt(weights, _build(arch, classes, shape), path, arch, shape, classes)
    tensors = require_tensors(weights, path)
    heads = auxiliary_heads(arch)
    tensors = strip_wrappers(tensors, heads) if heads else tensors
    ignored = tuple(name for name in tensors if name.startswith(heads))
    tensors = {name: tensors[name] for name in tensors if name not in ignored}
    if (sketched := sketch(arch, classes=classes, shape=shape)) is not None:
        require_fit(sketched, tensors, path, arch=arch)  # before the memory of the architecture is taken
    module = _build(arch, classes, shape)
    load_weights_(module, tensors, path, arch=arch)
    _require_usable(module, path, arch, shape, classes)
    return Loaded(module, ignored=ignored)


def _build(arch: str, classes: int, shape: Shape) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced; the caller's random state stays
        return build(arch, classes=classes, shape=shape)


def _load_earlier(content: Content, path: Path, arch: str, classes: int, shape: Shape, trust: bool) -> Loaded:
    """Rebuild an earlier slim model. Raises ModelFileError if it does not fit the recipe."""
    if (content.classes, content.shape) != (classes, tuple(shape)):
        raise ModelFileError(
            f"{path} has {content.classes} classes and input {list(content.shape)}; "
            f"the recipe says model.classes {classes} and model.input {list(shape)}"
        )
    slim = rebuild(content, path, arch, trust=trust)
    return Loaded(slim.module, edits=slim.edits, recipe=slim.recipe, report=slim.report)


def _adopt(pickled: nn.Module, module: nn.Module, path: Path, arch: str, shape: Shape, classes: int) -> Loaded:
    """Turn a pickled module, dense or pruned by any tool, into a module of `arch` that computes the same."""
    try:
        pickled = pickled.float().eval()
        edits = find_edits(pickled, module)
        apply_edits_(module, edits, dict(named_tensors(pickled)))
        _require_usable(module, path, arch, shape, classes)
        is_same = compare(pickled, module, shape) <= TOLERANCE
        reason = "their outputs differ"
    except Exception as error:  # a module from another version of its code can fail anywhere
        is_same, reason = False, str(error) if isinstance(error, DpmError) else one_line(error)
    if not is_same:
        raise ModelFileError(
            f"{path} holds a {type(pickled).__name__} that is not model.arch {arch}: {reason}; "
            "name the function that builds it as package.module:function"
        )
    return Loaded(module, edits=edits)


def _require_usable(module: nn.Module, path: Path, arch: str, shape: Shape, classes: int) -> None:
    """Check for finite weights and run one image. Leaves the module in eval mode."""
    require_sound(module, path)
    module.eval()
    if failure := find_failure(module, shape, classes):
        raise ModelFileError(f"{path} as {arch}: {failure}; check model.input and model.classes")

"""Keep a pruned model in a slim.pt, which outlives its run: a plain dict that `torch.load(weights_only=True)` reads.

format, version       "dpm-slim", 1 (2 with packed weights)
arch, classes, shape  what to build: the dense module; arch is None for a module that was given as an object
edits                 the integer attributes that differ from it (structure.py)
state_dict            parameters and persistent buffers;  buffers: those others that differ from the dense module's
packed                parameters of which few entries matter (packed.py), instead of in state_dict
frozen                names of the parameters that are not trained
recipe, report        YAML and JSON text
mean, std             of the pixels, per channel
metadata              the names of the classes, and how a picture becomes an input, as JSON text (metadata.py)
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpm_cli.errors import ModelFileError, RecipeError, RunError
from dpm_cli.files import write_atomic
from dpm_cli.layers.images import Shape
from dpm_cli.models.metadata import Metadata
from dpm_cli.models.outputs import compare, find_excess, find_failure
from dpm_cli.models.packed import Packed, pack, unpack
from dpm_cli.models.read import read_model_file
from dpm_cli.models.sketch import sketch
from dpm_cli.models.slim_content import FORMAT, VERSION, Content, parse_content
from dpm_cli.models.structure import Edits, apply_edits_, find_edits, named_tensors
from dpm_cli.models.weights import require_sound
from dpm_cli.models.zoo import build
from dpm_cli.recipe.code import is_own_code

TOLERANCE = 1e-4  # relative, between a module and itself rebuilt: other kernels for another memory layout


@dataclass(frozen=True)
class Slim:
    """The content of a slim.pt; `module` is in eval mode on the CPU."""

    module: nn.Module
    arch: str | None
    classes: int
    shape: Shape
    edits: Edits
    recipe: str  # YAML
    report: dict[str, Any]
    metadata: Metadata


def save_slim(
    path: Path,
    module: nn.Module,
    *,
    metadata: Metadata,
    recipe: str,
    report: Mapping[str, Any],
    dense: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a slim module, whole or not at all: the file is read back and compared before it gets its name.

    dense: an unpruned module of the same architecture, needed if `metadata.arch` is None; its weights do not matter,
    and it may be on the meta device. masks: which entries of a parameter were kept; the others must hold one or two
    numbers per filter. Gradients and hooks are not saved.
    Raises UnsupportedModelError if the module is not that architecture with fewer channels, RunError if the file
    cannot be written or does not give the same module again.

        save_slim(
            Path("slim.pt"), model, recipe="", report={},
            metadata=Metadata(10, Framing((3, 32, 32)), mean=(0.5,) * 3, std=(0.2,) * 3, arch="resnet56"),
        )
    """
    arch, classes, shape = metadata.arch, metadata.classes, metadata.framing.shape
    if dense is None:
        if arch is None:
            raise ValueError("a module without an architecture name needs its dense module")
        dense = _build(arch, classes, shape)
    state_dict, buffers = _collect_tensors(module, dense)
    packed = {name: pack(state_dict.pop(name), mask) for name, mask in (masks or {}).items()}
    content = {
        "format": FORMAT,
        "version": VERSION if packed else 1,
        "arch": arch,
        "classes": classes,
        "shape": list(shape),
        "edits": find_edits(module, dense),
        "state_dict": state_dict,
        "buffers": buffers,
        **({"packed": packed} if packed else {}),
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "recipe": recipe,
        "report": json.dumps(report),
        "mean": [float(value) for value in metadata.mean],
        "std": [float(value) for value in metadata.std],
        "metadata": json.dumps(metadata.to_dict()),
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, torch turns "disk full" into a RuntimeError of its own
            torch.save(content, file)
        again = parse_content(read_model_file(temporary), path)
        rebuilt = copy.deepcopy(dense).to_empty(device="cpu") if _is_meta(dense) else copy.deepcopy(dense).cpu()
        _fill_(rebuilt, again)
        _require_same(rebuilt, module, again, path)

    write_atomic(path, write)


def load_slim(path: Path, arch: str | None = None, *, model: nn.Module | None = None, trust: bool = False) -> Slim:
    """Read a slim.pt and rebuild its module, bit for bit.

    A file may name `package.module:function`, which would import what a stranger wrote into it, so such a name is only
    used if `arch` gives it too. model: a freshly built dense module for a file that was saved from an object; it is
    copied. trust: accept images that take far more memory than the file. Raises ModelFileError.

        slim = load_slim(Path("out/slim.pt"))
        slim.module, slim.report, slim.recipe
    """
    return rebuild(parse_content(read_model_file(path), path), path, arch, model=model, trust=trust)


def rebuild(
    content: Content, path: Path, arch: str | None = None, *, model: nn.Module | None = None, trust: bool = False
) -> Slim:
    """Rebuild the module of a file that has been read and checked. Arguments as for `load_slim`."""
    dense = copy.deepcopy(model) if model is not None else _sketch_dense(content, arch, path)
    try:
        _fill_(dense, content)
        if _is_meta(dense):  # large constants that the file does not hold, now that it is known to fit
            dense = _build_dense(content, arch, path)
            _fill_(dense, content)
    except ModelFileError as error:
        raise ModelFileError(
            f"{path} does not fit {'the given model' if model is not None else arch or content.arch}: {error}"
        ) from None
    require_sound(dense, path)
    dense.eval()
    if not trust and (excess := find_excess(dense, content.shape)):
        raise ModelFileError(f"{path}: {excess}; --trust (in Python trust=True) if you trust whoever made it")
    if failure := find_failure(dense, content.shape, content.classes):
        raise ModelFileError(f"{path} is damaged: {failure}")
    return Slim(
        module=dense,
        arch=arch or content.arch,
        classes=content.classes,
        shape=content.shape,
        edits=content.edits,
        recipe=content.recipe,
        report=content.report,
        metadata=content.metadata,
    )


def load(
    path: str | Path, arch: str | None = None, *, model: nn.Module | None = None, trust: bool = False
) -> nn.Module:
    """Load the module of a slim.pt, in eval mode on the CPU. `arch`, `model` and `trust` as for `load_slim`.

    model = dpm_cli.load("out/slim.pt")
    logits = model(images)  # (B, classes)
    """
    return load_slim(Path(path), arch, model=model, trust=trust).module


def _build(arch: str, classes: int, shape: Shape) -> nn.Module:
    with torch.random.fork_rng(
        devices=[]
    ):  # its random weights are thrown away; the caller's random state must not change
        return build(arch, classes=classes, shape=shape)


def name_arch(content: Content, arch: str | None, path: Path) -> str:
    """Return what builds the dense module: `arch`, or what the file says.

    Raises ModelFileError if only the file names code, if neither names anything, or if they do not agree.
    """
    saved = content.arch
    if saved is None and arch is None:
        was = f"{path} was pruned from a Python object"
        raise ModelFileError(
            f"{was}: pass model=, a freshly built dense module",
            in_cli=f"{was}: give --arch package.module:function, the function of yours that builds it",
        )
    if saved is not None and arch is None and is_own_code(saved):
        named = f"{path} names code to import, {saved!r}"
        raise ModelFileError(
            f"{named}: pass arch={saved!r} if that is your own code",
            in_cli=f"{named}: give --arch {saved} if that is your own code",
        )
    if saved is not None and arch is not None and saved != arch and not (is_own_code(saved) and is_own_code(arch)):
        raise ModelFileError(f"{path} holds a {saved}, model.arch is {arch}")
    return arch or saved or ""


def _sketch_dense(content: Content, arch: str | None, path: Path) -> nn.Module:
    """Build the dense module without its large tensors, which the file will replace, if its constructor allows that.

    Raises ModelFileError if the file names code, or another architecture than `arch`.
    """
    try:
        sketched = sketch(name_arch(content, arch, path), classes=content.classes, shape=content.shape)
    except RecipeError as error:
        raise ModelFileError(f"{path} cannot be rebuilt: {error}") from None
    return sketched if sketched is not None else _build_dense(content, arch, path)


def _build_dense(content: Content, arch: str | None, path: Path) -> nn.Module:
    try:
        return _build(arch or content.arch or "", content.classes, content.shape)
    except RecipeError as error:
        raise ModelFileError(f"{path} cannot be rebuilt: {error}") from None


def _fill_(dense: nn.Module, content: Content) -> None:
    apply_edits_(dense, content.edits, content.state_dict | content.buffers)
    _unpack_(dense, content.packed)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name not in content.frozen)


def _unpack_(module: nn.Module, packed: Mapping[str, Packed]) -> None:
    """Put the weights in place of which only the shapes are there. Raises ModelFileError if their bits do not agree."""
    for name, parts in packed.items():
        old = module.get_parameter(name)
        try:
            new = nn.Parameter(unpack(parts))
        except (ValueError, RuntimeError):
            raise ModelFileError(f"the packed {name} is damaged") from None
        for other, tensor in list(module.named_parameters(remove_duplicate=False)):
            if tensor is old:  # shared parameters stay shared
                owner, _, leaf = other.rpartition(".")
                setattr(module.get_submodule(owner), leaf, new)


def _collect_tensors(module: nn.Module, dense: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copy to the CPU: parameters and persistent buffers; and apart from them, other buffers that have changed."""
    persistent = module.state_dict(keep_vars=True).keys() | dict(module.named_parameters(remove_duplicate=False)).keys()
    built = dict(dense.named_buffers(remove_duplicate=False))
    state_dict: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    compact: dict[int, Tensor] = {}  # id -> copy: shared parameters are in the file once
    for name, tensor in named_tensors(module):
        if id(tensor) not in compact:
            # a clone, because saving a view would save all of the tensor it looks into
            compact[id(tensor)] = tensor.detach().clone(memory_format=torch.preserve_format).cpu()
        if name in persistent:
            state_dict[name] = compact[id(tensor)]
        elif name not in built or not _is_equal(tensor, built[name]):
            buffers[name] = compact[id(tensor)]
    return state_dict, buffers


def _require_same(rebuilt: nn.Module, module: nn.Module, content: Content, path: Path) -> None:
    """Raise RunError unless both have the same bits and compute the same."""
    saved = dict(named_tensors(module))
    for name, tensor in named_tensors(rebuilt):
        if not _is_equal(tensor, saved[name]):
            raise RunError(f"{path} would not hold the same model: {name} changed")
    weight = next(module.parameters(), None)
    if weight is not None:
        rebuilt.to(weight.device)
    if failure := find_failure(rebuilt, content.shape, content.classes):
        raise RunError(f"{path} would not hold a usable model: {failure}")
    difference = compare(module, rebuilt, content.shape)
    if not difference <= TOLERANCE:
        raise RunError(f"{path} would not hold the same model: its outputs differ by {difference:.1e} of the largest")


def _is_equal(left: Tensor, right: Tensor) -> bool:
    """Compare bit for bit, so NaN equals NaN. A tensor on the meta device equals nothing."""
    if left.is_meta or right.is_meta or left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = left.detach().cpu().contiguous(), right.detach().cpu().contiguous()
    return torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))


def _is_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for _, tensor in named_tensors(module))

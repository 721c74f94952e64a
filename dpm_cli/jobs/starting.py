"""Find the model that a job starts from: a module, a file, or published weights."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dpm_cli.engine.step import all_finite
from dpm_cli.errors import (
    DpmError,
    ModelFileError,
    RecipeError,
    UnsupportedModelError,
    UsageError,
    one_line,
)
from dpm_cli.layers.copyable import drop_histories_, keep_copyable_
from dpm_cli.models import apply_edits_, build, find_edits, load_model
from dpm_cli.models.outputs import compare, find_failure, sample_images
from dpm_cli.models.pretrained import load_pretrained, split_published
from dpm_cli.models.slim import TOLERANCE
from dpm_cli.models.structure import named_tensors
from dpm_cli.models.weights import find_negative_variance
from dpm_cli.recipe import Recipe
from dpm_cli.tasks.classification import main_output

AnyModel = nn.Module | str | Path


@dataclass(frozen=True)
class Start:
    """Holds the module that a job starts from, in eval mode on the CPU."""

    module: nn.Module
    arch: str | None  # what builds it; None for a module of unknown origin
    notes: tuple[str, ...] = ()  # for the user, one sentence each


def load_start(model: AnyModel | None, recipe: Recipe, trust: bool) -> Start:
    """Load the model that a job is given.

    model: a module; a file; `torchvision:NAME` or `timm:NAME` for published weights of that architecture; None for
    those that `model.weights` names. Raises UsageError, or one of its kinds.
    """
    spec = recipe.model
    if isinstance(model, nn.Module):
        drop_histories_(model)
        module = keep_copyable_(copy.deepcopy(model).cpu().float().eval())
        _require_usable(module, recipe)
        return Start(module, spec.arch if _is_built_by(module, recipe) else None)
    weights = spec.weights if model is None else _published_weights(str(model), recipe)
    if weights is not None:
        found = load_pretrained(
            weights, arch=spec.arch, classes=spec.classes, shape=spec.input, seed=recipe.seed, trust=trust
        )
        return Start(found.module, spec.arch, (found.note,) if found.note else ())
    if model is None:
        raise UsageError("no model is given: name a file, or torchvision:NAME, or set model.weights in the recipe")
    loaded = load_model(model, arch=spec.arch, classes=spec.classes, shape=spec.input, trust=trust)
    return Start(loaded.module, spec.arch)


def name_published(model: str) -> tuple[str, str] | None:
    """Return the architecture and the weights that `torchvision:NAME` or `timm:NAME[.TAG]` means; None for a file."""
    published = split_published(model)
    if published is None:
        return None
    source, name = published
    name, _, tag = name.partition(".")
    return f"{source}:{name}", f"{source}:{tag or 'DEFAULT'}"


def _published_weights(model: str, recipe: Recipe) -> str | None:
    """Return the weights that a model's name stands for; None for a file. Raises RecipeError for another arch."""
    named = name_published(model)
    if named is None:
        return None
    arch, weights = named
    if arch != recipe.model.arch:
        raise RecipeError(f"the model is {model}, but model.arch is {recipe.model.arch}: make them agree")
    return weights


def _require_usable(module: nn.Module, recipe: Recipe) -> None:
    """Check for finite weights and one row of logits per image. Raises UsageError."""
    spec = recipe.model
    if not all_finite(module.state_dict().values()):
        raise UsageError("the model holds weights that are NaN or infinite: it cannot be pruned")
    if name := find_negative_variance(module):
        raise UsageError(f"the model holds variances below zero in {name}: it cannot be pruned")
    try:
        with torch.no_grad():
            logits = main_output(module(sample_images(module, spec.input)))
    except DpmError:
        raise
    except Exception as error:  # a user's module may raise anything
        raise UsageError(
            f"the model does not run on images of {list(spec.input)} ({one_line(error)}): check model.input"
        ) from None
    if logits.shape[1] != spec.classes:
        raise UsageError(f"the model gives {logits.shape[1]} logits, model.classes is {spec.classes}: make them agree")


def _is_built_by(module: nn.Module, recipe: Recipe) -> bool:
    """Tell whether the recipe's architecture, dense or pruned, computes the same as this module."""
    spec = recipe.model
    try:
        with torch.random.fork_rng(devices=[]):
            built = build(spec.arch, classes=spec.classes, shape=spec.input).eval()
        apply_edits_(built, find_edits(module, built), dict(named_tensors(module)))
    except (RecipeError, UnsupportedModelError, ModelFileError):
        return False
    if any(find_failure(network, spec.input, spec.classes) for network in (module, built)):
        return False
    return compare(module, built, spec.input) <= TOLERANCE

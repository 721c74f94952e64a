"""Load what every job needs: a recipe, a model and its data."""

import copy
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from dpm_cli.data import Splits, load_data
from dpm_cli.engine.distributed import ALONE, World
from dpm_cli.engine.precision import choose_precision
from dpm_cli.engine.setup import Setup
from dpm_cli.engine.step import all_finite
from dpm_cli.errors import (
    DpmError,
    ModelFileError,
    RecipeError,
    UnsupportedModelError,
    UsageError,
    one_line,
)
from dpm_cli.events import Event
from dpm_cli.export import ExportedModel, is_program, open_exported
from dpm_cli.models import apply_edits_, build, find_edits, load_model
from dpm_cli.models.outputs import compare, find_failure, sample_images
from dpm_cli.models.slim import TOLERANCE
from dpm_cli.models.structure import named_tensors
from dpm_cli.recipe import Recipe, load_recipe, parse_recipe, require_trust
from dpm_cli.tasks.classification import main_output

T = TypeVar("T")
AnyRecipe = Recipe | str | Path | Mapping[str, Any]
OnEvent = Callable[[Event], None] | None


def follow(events: Generator[Event, None, T], on_event: OnEvent) -> T:
    """Run a story to its end, pass its events to `on_event`, and return its result."""
    try:
        while True:
            event = next(events)
            if on_event:
                on_event(event)
    except StopIteration as end:
        return cast(T, end.value)
    finally:
        events.close()


def telling(on_event: OnEvent) -> Callable[[Event], None]:
    """Return the user's function for events, or one that ignores them."""
    return on_event or (lambda event: None)


def load_splits(recipe: Recipe, device: torch.device) -> Splits:
    """Load the recipe's dataset, onto the device if it fits."""
    spec = recipe.model
    return load_data(recipe.data, shape=spec.input, classes=spec.classes, seed=recipe.seed, device=device)


def make_setup(
    recipe: Recipe,
    splits: Splits,
    checkpoint: Path,
    device: torch.device,
    should_stop: Callable[[], int] | None = None,
    world: World = ALONE,
) -> Setup:
    """Gather what all stages of a run share."""
    return Setup(
        splits=splits,
        data=recipe.data,
        seed=recipe.seed,
        checkpoint=checkpoint,
        checkpoint_every=recipe.checkpoint.every,
        device=device,
        precision=choose_precision(recipe.precision, device),
        should_stop=should_stop or (lambda: False),
        world=world,
    )


def resolve_recipe(recipe: AnyRecipe, *, trust: bool) -> Recipe:
    """Read and check a recipe. Raises RecipeError, also if it names code that would run without `trust`."""
    if isinstance(recipe, Mapping):
        recipe = parse_recipe(dict(recipe))
    elif not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    require_trust(recipe, trust=trust)
    return recipe


def open_deployed(path: Path, trust: bool) -> ExportedModel | None:
    """Open a deployed file. Returns None if the file may hold weights instead."""
    try:
        return open_exported(path, trust=trust)
    except ModelFileError:
        if is_program(path):
            raise
        return None


def load_module(model: nn.Module | str | Path, recipe: Recipe, trust: bool) -> tuple[nn.Module, str | None]:
    """Load a module in eval mode on the CPU, with the recipe's architecture name if that builds it."""
    spec = recipe.model
    if isinstance(model, nn.Module):
        module = copy.deepcopy(model).cpu().float().eval()
        _require_usable(module, recipe)
        return module, spec.arch if _is_built_by(module, recipe) else None
    loaded = load_model(model, arch=spec.arch, classes=spec.classes, shape=spec.input, trust=trust)
    return loaded.module, spec.arch


def _require_usable(module: nn.Module, recipe: Recipe) -> None:
    """Check for finite weights and one row of logits per image. Raises UsageError."""
    spec = recipe.model
    if not all_finite(module.state_dict().values()):
        raise UsageError("the model holds weights that are NaN or infinite: it cannot be pruned")
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

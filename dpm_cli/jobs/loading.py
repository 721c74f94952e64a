"""Load what every job needs: a recipe, a model and its data."""

from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from dpm_cli.data import Splits, load_data
from dpm_cli.engine.distributed import ALONE, World
from dpm_cli.engine.precision import choose_precision
from dpm_cli.engine.setup import Setup
from dpm_cli.errors import (
    ModelFileError,
    UsageError,
)
from dpm_cli.events import Event, FilesDecoded
from dpm_cli.export import ExportedModel, is_program, open_exported
from dpm_cli.recipe import Recipe, load_recipe, parse_recipe, require_trust

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


def load_splits(recipe: Recipe, device: torch.device, tell: Callable[[Event], None] = lambda event: None) -> Splits:
    """Load the recipe's dataset, onto the device if it fits, and tell what is decoded."""
    spec = recipe.model
    return load_data(
        recipe.data,
        shape=spec.input,
        classes=spec.classes,
        seed=recipe.seed,
        device=device,
        tell=lambda split, decoded, files: tell(FilesDecoded(split, decoded, files)),
    )


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
        engine=recipe.engine,
        should_stop=should_stop or (lambda: False),
        world=world,
    )


def resolve_recipe(recipe: AnyRecipe, *, trust: bool) -> Recipe:
    """Read and check a recipe. Raises RecipeError, also if it names code that would run without `trust`."""
    if isinstance(recipe, Mapping):
        recipe = parse_recipe(dict(recipe))
    elif isinstance(recipe, str | Path):
        recipe = load_recipe(recipe)
    elif not isinstance(recipe, Recipe):
        raise UsageError(f"the recipe is a {type(recipe).__name__}; give a path, a shipped name or a mapping")
    require_trust(recipe, trust=trust)
    return recipe


def open_deployed(
    path: Path, trust: bool, *, runtime: str | None = None, threads: int | None = None
) -> ExportedModel | None:
    """Open a deployed file, in its usual runtime unless told. Returns None if the file may hold weights instead."""
    try:
        return open_exported(path, trust=trust, runtime=runtime, threads=threads, confined=True)
    except ModelFileError:
        if is_program(path):
            raise
        return None

"""Settle the settings of a command: a recipe, or one drafted on the spot, with the most used settings as options."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpm_cli.data.look import TABLES, look_at
from dpm_cli.errors import ModelFileError, UsageError
from dpm_cli.jobs.draft import draft_recipe
from dpm_cli.jobs.starting import name_published
from dpm_cli.models.read import read_model_file
from dpm_cli.models.slim import name_arch
from dpm_cli.models.slim_content import Content, is_slim, parse_content
from dpm_cli.recipe import Recipe, load_recipe, read_recipe


@dataclass(frozen=True)
class Shortcuts:
    """Holds the settings that have options of their own; None for those that were not given."""

    arch: str | None = None
    data: str | None = None  # a folder, a table, or a dataset's name
    weights: str | None = None
    macs: str | None = None  # a fraction or an absolute, as text
    params: str | None = None
    epochs: int | None = None  # of every stage of training
    batch: int | None = None


def settle(
    recipe: str | Path | None, overrides: Sequence[str], shortcuts: Shortcuts, *, model: str | Path | None = None
) -> Recipe:
    """Combine a recipe with options; `overrides` (key=value) win. Without a recipe, draft one for the images.

    model: what is to be pruned; `torchvision:NAME` names the architecture too, and a slim.pt also what its inputs are.
    Raises a UsageError.
    """
    named = name_published(str(model)) if model is not None else None
    arch = shortcuts.arch or (named[0] if named else None)
    if recipe is not None:
        before = load_recipe(recipe)
        return load_recipe(recipe, [*_change(shortcuts, arch, before, overrides), *overrides])
    if shortcuts.data is None:
        raise UsageError("no settings are given: name a --recipe, or --data (and --arch) to have one made")
    path = None if model is None or named else Path(model)
    slim = _read_slim(path) if path else None
    if path and slim:
        arch = name_arch(slim, arch, path)
    elif arch is None and model is not None:
        raise UsageError(f"which architecture has {model}? --arch names it, such as --arch torchvision:resnet18")
    text = draft_recipe(shortcuts.data, arch=arch, weights=shortcuts.weights, shape=slim.shape if slim else None)
    before = read_recipe(text)
    pixels = [f"data.mean={[*slim.metadata.mean]}", f"data.std={[*slim.metadata.std]}"] if slim else []
    return read_recipe(text, [*pixels, *_change(shortcuts, arch, before, overrides), *overrides])


def _read_slim(path: Path) -> Content | None:
    """Read what a slim.pt says; None for other files, and for those that cannot be read: the job will say why."""
    try:
        content = read_model_file(path)
        return parse_content(content, path) if is_slim(content) else None
    except ModelFileError:
        return None


def _change(shortcuts: Shortcuts, arch: str | None, before: Recipe, overrides: Sequence[str]) -> Iterator[str]:
    """Turn the options into overrides of a recipe. before: the recipe without them."""
    texts = {"model.arch": arch, "model.weights": shortcuts.weights}
    target = {"macs": shortcuts.macs, "params": shortcuts.params}
    if target := {kind: amount for kind, amount in target.items() if amount is not None}:
        yield f"prune.target={json.dumps(target)}"  # both hold if both are given
    yield from (f"{key}={json.dumps(text)}" for key, text in texts.items() if text is not None)
    if shortcuts.data is not None:
        yield from _change_data(shortcuts.data, overrides)
    if shortcuts.batch is not None:
        yield f"data.batch={shortcuts.batch}"
    if shortcuts.epochs is not None:
        stages = {"train": before.train, "finetune": before.finetune, "dense": before.dense}
        used = [name for name, training in stages.items() if training is not None and training.epochs]
        yield from (f"{name}.epochs={shortcuts.epochs}" for name in used)


def _change_data(data: str, overrides: Sequence[str]) -> Iterator[str]:
    """Name the images; the number of classes follows unless it is given."""
    path = Path(data).expanduser()
    if not (path.is_dir() or path.suffix in TABLES):
        yield f"data.name={json.dumps(data)}"
        return
    look = look_at(data)
    yield f"data.name={look.name}"
    yield f"data.root={json.dumps(data, ensure_ascii=False)}"
    if not any(override.partition("=")[0].strip() == "model.classes" for override in overrides):
        yield f"model.classes={len(look.classes)}"

"""Read YAML into a checked `Recipe`. All mistakes are reported together, before torch is imported."""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dpm_cli.errors import RecipeError, flatten
from dpm_cli.recipe.check import explain
from dpm_cli.recipe.schema import Recipe

MAX_RECIPE_BYTES = 1 << 17  # a megabyte of brackets takes twenty seconds


def recipes_folder() -> Path:
    """Return the folder of the recipes that come with dpm."""
    package = Path(str(resources.files("dpm_cli")))
    folder = package / "recipes"  # in a wheel; a checkout has them beside the package
    return folder if folder.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Map the names of the recipes that come with dpm to their files, sorted."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a path or a shipped name, then apply `key.sub=value` overrides.

    Raises RecipeError that names every mistake.
    """
    path = Path(source)
    if not path.is_file():
        path = shipped_recipes().get(path.name.removesuffix(".yaml"), path) if path.parent == Path() else path
    if not path.is_file():
        near = difflib.get_close_matches(path.name.removesuffix(".yaml"), shipped_recipes(), n=1)
        way_out = f"; did you mean {near[0]!r}?" if near else f" ({', '.join(shipped_recipes())})"
        raise RecipeError(f"no recipe {str(source)!r}: neither a file nor a shipped recipe{way_out}")
    recipe = read_recipe(read_recipe_text(path), overrides, name=str(path))
    recipe._source = path
    return recipe


def read_recipe_text(path: Path) -> str:
    """Read the YAML of a recipe. Raises RecipeError if it cannot be read, or is too large."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{path} is larger than {MAX_RECIPE_BYTES} bytes: not a recipe")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as UTF-8 text: {error}") from None


def read_recipe(text: str, overrides: Sequence[str] = (), *, name: str = "recipe") -> Recipe:
    """Check YAML text, such as the recipe in a slim.pt. Raises RecipeError that names every mistake."""
    if len(text) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{name} is larger than {MAX_RECIPE_BYTES} bytes: not a recipe")
    return parse_recipe(_parse_yaml(text, name), overrides, name=name)


def parse_recipe(values: object, overrides: Sequence[str] = (), *, name: str = "recipe") -> Recipe:
    """Check a mapping of settings. Raises RecipeError that names every mistake."""
    if not isinstance(values, dict):
        raise RecipeError(f"{name} is not a mapping of settings")
    for override in overrides:
        values = _override(values, override)
    typed = frozenset(override.partition("=")[0].strip() for override in overrides)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, name, typed)) from None
    recipe._changes = tuple(overrides)
    recipe._typed = typed
    return recipe


def hash_recipe(recipe: Recipe) -> str:
    """Return twelve hex digits that change with any setting."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:12]


def dump_recipe(recipe: Recipe) -> str:
    """Write the resolved recipe as YAML that `load_recipe` can read."""
    return yaml.safe_dump(plain_values(recipe), sort_keys=False)


def plain_values(recipe: Recipe) -> dict[str, Any]:
    """Return all settings as YAML can hold them."""
    values: dict[str, Any] = json.loads(recipe.model_dump_json())
    if recipe.decay.rectify is None:
        values["decay"]["rectify"] = False
    values["prune"]["target"] = json.loads(recipe.prune.target.model_dump_json(exclude_none=True))
    return values


class _Loader(yaml.SafeLoader):
    """Refuses aliases (a few bytes expand to gigabytes) and repeated keys, and reads `5e-4` as a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} is given twice (line {key.start_mark.line + 1})")
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse_yaml(text: str, name: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"{name} is not a YAML recipe: {_explain_yaml(error)}") from None


def _explain_yaml(error: Exception) -> str:
    """Say what is wrong in which line, without the parser's picture of the place."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark and error.problem:
        place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        return flatten(f"{error.problem} {error.context or ''}") + f" ({place})"
    return flatten(error).replace(' in "<unicode string>"', "")


def _override(values: dict[Any, Any], override: str) -> dict[Any, Any]:
    """Apply `a.b=value` to a copy of `values`."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override!r} is not of the form key=value, for example --set prune.rounds=3")
    changed = dict(values)
    node, *path = changed, *key.strip().split(".")
    for part in path[:-1]:
        child = node.get(part)
        node[part] = dict(child) if isinstance(child, dict) else {}
        node = node[part]
    if path[:-1] == ["prune", "target"]:
        node.clear()  # one target replaces another
    node[path[-1]] = _parse_yaml(text, f"--set {override}")
    return changed

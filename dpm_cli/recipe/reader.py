"""YAML that a user owns -> a checked `Recipe`. Every mistake is reported at once, before torch is imported."""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dpm_cli.errors import RecipeError
from dpm_cli.recipe.schema import Recipe

MAX_RECIPE_BYTES = 1 << 20


def shipped_recipes() -> dict[str, Path]:
    """Names of the recipes that come with dpm -> their files, sorted."""
    package = Path(str(resources.files("dpm_cli")))
    folder = package / "recipes"  # in a wheel; in a checkout they lie beside the package
    folder = folder if folder.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a path or a shipped name, then apply `key.sub=value` overrides.

    Raises RecipeError that names every mistake.
    """
    path = Path(source)
    if not path.is_file():
        path = shipped_recipes().get(path.name.removesuffix(".yaml"), path) if path.parent == Path() else path
    if not path.is_file():
        known = ", ".join(shipped_recipes())
        raise RecipeError(f"no recipe {str(source)!r}: neither a file nor a shipped recipe ({known})")
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{path} is larger than {MAX_RECIPE_BYTES} bytes: not a recipe")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as UTF-8 text: {error}") from None
    return parse_recipe(_parse_yaml(text, str(path)), overrides, name=str(path))


def parse_recipe(values: object, overrides: Sequence[str] = (), *, name: str = "recipe") -> Recipe:
    """Check a mapping of settings. Raises RecipeError that names every mistake."""
    if not isinstance(values, dict):
        raise RecipeError(f"{name} is not a mapping of settings")
    for override in overrides:
        values = _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError([f"{name}: {problem}" for problem in _explain(error)]) from None


def hash_recipe(recipe: Recipe) -> str:
    """Twelve hex digits that change with any setting."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:12]


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back."""
    values = json.loads(recipe.model_dump_json())
    if recipe.decay.rectify is None:
        values["decay"]["rectify"] = False
    target = recipe.prune.target
    values["prune"]["target"] = {"sparsity": list(target.sparsity)} if target.sparsity else {target.kind: target.amount}
    return yaml.safe_dump(values, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases (a few bytes of them expand to gigabytes), repeated keys, or `5e-4` as a string."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} stands twice (line {key.start_mark.line + 1})")
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse_yaml(text: str, name: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"{name} is not a YAML recipe: {' '.join(str(error).split())[:200]}") from None


def _override(values: dict[Any, Any], override: str) -> dict[Any, Any]:
    """`a.b=value` -> a copy of `values` with that one setting changed."""
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


def _explain(error: ValidationError) -> list[str]:
    """One line per mistake: where, what, and the nearest known key."""
    return [_explain_one(problem) for problem in error.errors(include_url=False)]


def _explain_one(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "recipe"
    value = problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            known = _keys_at(problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            way_out = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            return f"unknown key {place!r}; {way_out}"
        case "missing":
            return f"{place!r} is missing"
        case "literal_error":
            expected = problem["ctx"]["expected"].replace(" or ", ", ")
            return f"{place} is {_show(value)}; known: {expected}"
        case "value_error":
            shown = f" is {_show(value)};" if isinstance(value, str | int | float) else ""
            return f"{place}{shown} {problem['ctx']['error']}"
        case _:
            return f"{place} is {_show(value)}; {problem['msg'].lower()}"


def _show(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to print numbers of thousands of digits
        return "a number of thousands of digits"
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _keys_at(path: Sequence[str | int]) -> list[str]:
    """The known keys of the section at a path such as ("train",)."""
    section: type[BaseModel] = Recipe
    for part in path:
        field = section.model_fields.get(str(part))
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
    return list(section.model_fields)

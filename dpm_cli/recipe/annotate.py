"""Explain recipes to people and editors: YAML with a comment beside every setting, and the JSON Schema of recipes."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from dpm_cli.recipe.check import find_section
from dpm_cli.recipe.reader import plain_values, recipes_folder
from dpm_cli.recipe.schema import Recipe

SCHEMA = "schema.json"  # beside the shipped recipes
EDITORS = "# yaml-language-server: $schema="  # how editors learn the schema of a file
WIDTH = 120  # characters of a line, with its comment


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def dump_schema() -> str:
    return json.dumps(recipe_schema(), indent=1) + "\n"


def point_to_schema(text: str) -> str:
    """Let the line for editors in a shipped recipe name the schema wherever the text is copied to."""
    return text.replace(EDITORS + SCHEMA, editors_line())


def editors_line() -> str:
    """Return the comment by which editors find the schema of this installation."""
    return EDITORS + (recipes_folder() / SCHEMA).resolve().as_uri()


def annotate_recipe(recipe: Recipe) -> str:
    """Write the resolved recipe as YAML with a comment beside every setting. `load_recipe` can read it."""
    return "\n".join([editors_line(), *_annotate(Recipe, plain_values(recipe), "")]) + "\n"


def _annotate(section: type[BaseModel], values: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if name not in values:
            continue
        value, comment = values[name], f"# {field.description}"
        inner = find_section(field.annotation)
        if isinstance(value, Mapping) and inner is not None:
            if not indent:
                yield ""
            yield from _beside(f"{indent}{name}:", comment, indent)
            yield from _annotate(inner, value, f"{indent}  ")
        else:
            yield from _beside(f"{indent}{name}: {_write(value)}", comment, indent)


def _beside(line: str, comment: str, indent: str) -> Iterator[str]:
    """Put a comment behind a line if there is room, else above it."""
    together = f"{line}  {comment}"
    if len(together) <= WIDTH:
        yield together
    else:
        yield f"{indent}{comment}"
        yield line


def _write(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")

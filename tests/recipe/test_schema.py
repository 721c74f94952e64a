"""The settings describe themselves: every field has a description, and the JSON Schema agrees with the recipes."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from dpm_cli.errors import RecipeError
from dpm_cli.recipe import (
    Recipe,
    annotate_recipe,
    dump_recipe,
    dump_schema,
    load_recipe,
    parse_recipe,
    point_to_schema,
    shipped_recipes,
)
from dpm_cli.recipe.reader import recipes_folder

SCHEMA = json.loads(dump_schema())
SMALLEST: dict[str, Any] = {"model": {"arch": "digits"}, "data": {"name": "digits"}, "prune": {"target": {"macs": 0.5}}}


def sections(root: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """All sections below `root`, itself included."""
    yield root
    for field in root.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind)


@pytest.mark.parametrize("section", dict.fromkeys(sections(Recipe)), ids=lambda section: section.__name__)
def test_every_setting_has_a_description(section: type[BaseModel]) -> None:
    bare = [name for name, field in section.model_fields.items() if len(field.description or "") < 8]
    assert bare == []


@pytest.mark.parametrize("name", shipped_recipes())
def test_schema_accepts_every_shipped_recipe(name: str) -> None:
    jsonschema.validate(yaml.safe_load(shipped_recipes()[name].read_text(encoding="utf-8")), SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        {"prune": {"target": {"macs": "60M"}, "round_to": "auto", "rounds": "auto"}},
        {"prune": {"target": {"macs": 60_000_000}, "round_to": 8, "rounds": 3}},
        {"prune": {"base": "on-the-fly", "target": {"sparsity": 0.5}}, "finetune": {"epochs": 0}},
        {"decay": {"rectify": False, "steps": "auto"}},
        {"decay": {"rectify": True, "steps": 30}},
    ],
    ids=str,
)
def test_schema_accepts_what_recipes_may_say(change: dict[str, Any]) -> None:
    parse_recipe(SMALLEST | change)
    jsonschema.validate(SMALLEST | change, SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        {"prune": {"target": {"macs": 0.5}, "rouds": 3}},
        {"prune": {"target": {"macs": 0.5}, "rounds": "many"}},
        {"train": {"epochs": -1}},
        {"data": {"name": "digitz"}},
        {"trian": {}},
    ],
    ids=str,
)
def test_schema_refuses_what_recipes_may_not_say(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(SMALLEST | change)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(SMALLEST | change, SCHEMA)


def test_the_schema_beside_the_recipes_is_the_current_one() -> None:
    """Write it again with: dpm schema > recipes/schema.json"""
    assert (recipes_folder() / "schema.json").read_text(encoding="utf-8") == dump_schema()


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_tell_editors_where_the_schema_is(name: str) -> None:
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    assert "\n# yaml-language-server: $schema=schema.json\n" in text
    place = re.search(r"\$schema=file://(\S+)\n", point_to_schema(text))
    assert place
    assert json.loads(Path(place[1]).read_text()) == SCHEMA


@pytest.mark.parametrize("name", shipped_recipes())
def test_annotated_recipe_is_the_same_recipe(name: str) -> None:
    recipe = load_recipe(name)
    text = annotate_recipe(recipe)
    assert dump_recipe(parse_recipe(yaml.safe_load(text))) == dump_recipe(recipe)
    assert text.startswith("# yaml-language-server: $schema=file://")
    assert "  # the base pruner, which says which units are redundant\n" in text
    lines = text.splitlines()
    settings = [(above, line) for above, line in itertools.pairwise(lines) if line.strip() and line.strip()[0] != "#"]
    assert [line for above, line in settings if "  # " not in line and not above.strip().startswith("# ")] == []


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("epochs=3", "'train.epochs' or 'finetune.epochs' or 'dense.epochs'"),
        ("prune.steps=3", "'decay.steps'"),
        ("train.round=3", "'prune.rounds'"),
        ("data.bach=3", "'batch'"),
        ("weight_decy=3", "'train.weight_decay'"),
    ],
)
def test_a_setting_in_the_wrong_place_is_told_the_right_one(override: str, named: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"did you mean {named}?")):
        parse_recipe(SMALLEST, [override])


def test_a_key_like_no_other_is_told_no_other() -> None:
    with pytest.raises(RecipeError, match="unknown key 'nothing'; known: "):
        parse_recipe(SMALLEST, ["nothing=1"])


def test_a_mistyped_recipe_name_is_told_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'foldr': .*did you mean 'folder'\?"):
        load_recipe("foldr")

"""The settings describe themselves: every field has a description, and the JSON Schema agrees with the recipes."""

from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from dpm_cli.recipe import Recipe


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

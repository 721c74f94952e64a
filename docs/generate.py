"""Fill in the references from the code: settings from the schema, commands from the command line."""

from collections.abc import Iterator
from typing import Any

import typer
from pydantic import BaseModel

from dpm_cli.cli.app import app
from dpm_cli.recipe import Recipe

SETTINGS, COMMANDS = "<!-- settings -->", "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page. mkdocs calls this for every page."""
    if SETTINGS in markdown:
        markdown = markdown.replace(SETTINGS, "\n".join(describe_settings(Recipe, "")))
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, "\n".join(describe_commands()))
    return markdown


def describe_settings(section: type[BaseModel], path: str) -> Iterator[str]:
    """Yield a table of the settings of a section, then those of the sections in it."""
    inner: list[tuple[str, type[BaseModel]]] = []
    yield f"## {path or 'The whole recipe'}\n"
    yield "| setting | default | what |\n|---|---|---|"
    for name, field in section.model_fields.items():
        below = find_section(field.annotation)
        if below is not None:
            inner.append((f"{path}.{name}" if path else name, below))
        shown = "needed" if field.is_required() else "a section" if below else f"`{write(field.default)}`"
        what = (field.description or "").replace("|", "\\|")
        yield f"| `{name}` | {shown} | {what} |"
    yield ""
    for name, below in inner:
        yield from describe_settings(below, name)


def find_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a setting is, also if it may be null."""
    for each in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def write(value: object) -> str:
    """Write a default as YAML does."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case tuple() | list():
            return f"[{', '.join(map(write, value))}]"
        case _:
            return str(value).replace("|", "\\|")


def describe_commands() -> Iterator[str]:
    """Yield the help of every command."""
    group: Any = typer.main.get_command(app)
    with group.make_context("dpm", [], resilient_parsing=True) as parent:
        for name, command in group.commands.items():
            settings = {"resilient_parsing": True, "max_content_width": 100}
            with command.make_context(name, [], parent=parent, **settings) as context:
                yield f"## dpm {name}\n\n```text\n{command.get_help(context)}\n```\n"

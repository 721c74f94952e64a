"""`dpm recipes`: list or print the shipped recipes, to copy and change."""

import difflib
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from dpm_cli.cli.options import AsJson
from dpm_cli.cli.outcome import print_json
from dpm_cli.errors import RecipeError, UsageError


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the shipped recipes, or print one.

    To make one your own: dpm recipes cifar10 > mine.yaml
    """
    from dpm_cli.recipe import point_to_schema, shipped_recipes

    shipped = shipped_recipes()
    if name is None:
        _list(shipped, as_json=as_json)
        return
    if as_json:
        raise UsageError(f"--json lists the recipes, {name} is printed as YAML: give one of them")
    stem = name.removesuffix(".yaml")
    if stem not in shipped:
        near = difflib.get_close_matches(stem, shipped, n=1)
        way_out = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(shipped)}"
        raise RecipeError(f"no shipped recipe {name!r}; {way_out}")
    sys.stdout.write(point_to_schema(shipped[stem].read_text(encoding="utf-8")))


def _list(shipped: Mapping[str, Path], *, as_json: bool) -> None:
    from dpm_cli.recipe import load_recipe

    listed = [
        {"name": name, "file": str(path), "about": first_comment(path), "needs_trust": bool(load_recipe(path).code)}
        for name, path in shipped.items()
    ]
    if as_json:
        print_json(listed)
        return
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    width = max(map(len, shipped), default=0) + 2
    for each in listed:
        needs = " (names code to run: needs --trust)" if each["needs_trust"] else ""
        line = f"{each['name']:<{width}}{each['about']}{needs}"
        print(textwrap.fill(line, columns, subsequent_indent=" " * width, break_on_hyphens=False))


def first_comment(path: Path) -> str:
    """Read what a recipe says about itself in its first line."""
    line, *_ = path.read_text(encoding="utf-8").splitlines() or [""]
    return line.removeprefix("#").strip()

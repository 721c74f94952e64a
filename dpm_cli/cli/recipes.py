"""`dpm recipes`: list or print the shipped recipes, to copy and change."""

import difflib
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from dpm_cli.errors import RecipeError


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe.", show_default=False)] = None,
) -> None:
    """List the shipped recipes, or print one.

    To make one your own: dpm recipes cifar10 > mine.yaml
    """
    from dpm_cli.recipe import load_recipe, point_to_schema, shipped_recipes

    shipped = shipped_recipes()
    if name is None:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
        width = max(map(len, shipped), default=0) + 2
        for each, path in shipped.items():
            needs = " (names code to run: needs --trust)" if load_recipe(path).code else ""
            line = f"{each:<{width}}{first_comment(path)}{needs}"
            print(textwrap.fill(line, columns, subsequent_indent=" " * width, break_on_hyphens=False))
        return
    stem = name.removesuffix(".yaml")
    if stem not in shipped:
        near = difflib.get_close_matches(stem, shipped, n=1)
        way_out = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(shipped)}"
        raise RecipeError(f"no shipped recipe {name!r}; {way_out}")
    sys.stdout.write(point_to_schema(shipped[stem].read_text(encoding="utf-8")))


def first_comment(path: Path) -> str:
    """Read what a recipe says about itself in its first line."""
    line, *_ = path.read_text(encoding="utf-8").splitlines() or [""]
    return line.removeprefix("#").strip()

"""Keep the recipe of a run in its folder from the first step on, with the changes that were typed beside it."""

from pathlib import Path

from dpm_cli.errors import OutputError
from dpm_cli.files import MARKS, read_regular_text, require_ours, write_text_atomic
from dpm_cli.recipe import Recipe, annotate_recipe

NAME = "recipe.yaml"
CHANGE = "# changed: "


def write_resolved(folder: Path, recipe: Recipe) -> None:
    """Write every setting, and at the end what `--set` and the like changed."""
    mark = MARKS[NAME].decode()
    changes = "".join(f"{CHANGE}{' '.join(change.split())}\n" for change in recipe.changes)
    write_text_atomic(folder / NAME, f"{annotate_recipe(recipe)}\n{mark}\n{changes}")


def read_changes(folder: Path) -> list[str]:
    """Return the changes of the run in a folder; none if there is no run of ours."""
    path = folder / NAME
    try:
        require_ours({path: MARKS[NAME]})
        lines = read_regular_text(path).splitlines()
    except (OutputError, OSError, UnicodeDecodeError):
        return []
    return [line.removeprefix(CHANGE) for line in lines if line.startswith(CHANGE)]

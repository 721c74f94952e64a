"""Keep the recipe of a run in its folder from the first step on, with its model and the changes that were typed."""

import contextlib
import json
from pathlib import Path

from dpm_cli.errors import OutputError
from dpm_cli.files import MARKS, read_regular_text, require_ours, write_text_atomic
from dpm_cli.recipe import Recipe, annotate_recipe

NAME = "recipe.yaml"
CHANGE, MODEL = "# changed: ", "# model: "


def write_resolved(folder: Path, recipe: Recipe, model: str | None = None) -> None:
    """Write every setting, and at the end the path or name of the model, and what `--set` and the like changed."""
    mark = MARKS[NAME].decode()
    changes = "".join(f"{CHANGE}{' '.join(change.split())}\n" for change in recipe.changes)
    start = "" if model is None else f"{MODEL}{json.dumps(model)}\n"
    write_text_atomic(folder / NAME, f"{annotate_recipe(recipe)}\n{mark}\n{start}{changes}")


def read_changes(folder: Path) -> list[str]:
    """Return the changes of the run in a folder; none if there is no run of ours."""
    return _read_lines(folder, CHANGE)


def read_model(folder: Path) -> str | None:
    """Return the path or name of the model of the run in a folder; None if it is not known."""
    with contextlib.suppress(ValueError, RecursionError):
        for line in _read_lines(folder, MODEL):
            model = json.loads(line)
            return model if isinstance(model, str) else None
    return None


def _read_lines(folder: Path, prefix: str) -> list[str]:
    path = folder / NAME
    try:
        require_ours({path: MARKS[NAME]})
        lines = read_regular_text(path).splitlines()
    except (OutputError, OSError, UnicodeDecodeError):
        return []
    return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]

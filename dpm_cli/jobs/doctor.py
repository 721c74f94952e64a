"""`dpm doctor`: say what is in the folder of a run, and what can be resumed. It only reads, and runs nothing."""

import shlex
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpm_cli.engine.checkpoint import read_verified
from dpm_cli.errors import DpmError, OutputError, RecipeError
from dpm_cli.files import (
    CHECKPOINT,
    LOCK,
    MAGIC,
    MARKS,
    METRICS,
    REPORT,
    find_holder,
    find_leftovers,
    marks_of,
    parts_of,
    previous_of,
    read_regular_text,
    require_ours,
    size_of,
    written_in,
)
from dpm_cli.models.read import read_model_file
from dpm_cli.models.slim_content import is_slim, parse_content
from dpm_cli.recipe import Recipe, read_recipe
from dpm_cli.report import Report
from dpm_cli.results import Examined, Found
from dpm_cli.run.resolved import NAME, read_model

TRAINING, PREVIOUS = ".checkpoint.pt", ".previous.pt"  # ends of names: checkpoints of `dpm train`, the last but one
MOST = 100  # trainings that are looked at in one folder
LONGEST = 1000  # letters of a sentence


def examine(folder: str | Path) -> Examined:
    """Say what is in the folder of a run, or in one with trainings. Raises OutputError if it cannot be read.

    Every file is read as runs read it: checksums are compared, nothing in it is executed, nothing is written.
    """
    place = Path(folder)
    try:
        names = sorted(path.name for path in place.iterdir())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{str(folder)!r} cannot be read: {reason}; give the folder of a run") from None
    newest = {name.replace(PREVIOUS, ".pt") for name in names}
    begun = [place / name for name in sorted(newest) if name == CHECKPOINT or name.endswith(TRAINING)][:MOST]
    saved = {path: _read_saved(path) for each in begun for path in marks_of(each)}
    files = [_look_at(path, mark) for path, mark in written_in(place).items() if path not in saved]
    files += [_list_saved(path, each) for path, each in saved.items()]
    leftovers = find_leftovers(place, (*MARKS, *(path.name for path in begun)))
    files += [Found(path.name, _size(path), "leftover", "a killed process left it behind") for path in leftovers]
    locks = [place / name for name in names if name.startswith(LOCK)]
    others = len(names) - len(files) - len(locks)
    problem = None
    try:
        state, advice = _conclude(place, files, begun, saved, locks)
    except OutputError as error:
        state, advice, problem = "broken", [], str(error)
    return Examined(str(folder), state, tuple(files), others, tuple(map(_clean, advice)), problem)


class _Saved(NamedTuple):
    """What a checkpoint tells of itself."""

    position: str | None  # None if it is damaged
    recipe: str


def _conclude(
    place: Path, files: Sequence[Found], begun: Sequence[Path], saved: Mapping[Path, _Saved], locks: Sequence[Path]
) -> tuple[str, list[str]]:
    """Return the state of a folder and what to do next, see `Examined`. Raises OutputError that says what is wrong.

    begun: the newest checkpoints of all unfinished runs, which may be missing.
    """
    holders = [holder for path in locks if (holder := find_holder(path))]
    if holders:
        return "busy", [f"in use by {holder}: wait until that run is over" for holder in holders]
    is_of_run = not begun or place / CHECKPOINT in begun  # `dpm train` writes beside what may be anything
    for each in files:
        if each.state == "foreign" and (is_of_run or place / each.name in saved):
            raise OutputError(each.what)
    if begun:
        return "unfinished", [_advise(path, saved) for path in begun]
    for each in files:
        if each.state == "damaged":
            raise OutputError(f"{place / each.name}: {each.what}; run again with --overwrite")
    if any(each.name == REPORT for each in files):
        _require_all(place)
        return "finished", [f"finished; {_quote('dpm', 'report', place)} draws its page again"]
    if {NAME, METRICS} & {each.name for each in files}:
        return "begun", [f"nothing was saved yet: {_resume(place)} starts at the beginning"]
    return "empty", ["no run and no unfinished training is here"]


# ----------------------------------------------------------------------------------------------------- looking at files


def _look_at(path: Path, mark: bytes) -> Found:
    try:
        require_ours({path: mark})
    except OutputError as error:
        return Found(path.name, _size(path), "foreign", _clean(error))
    try:
        return Found(path.name, _size(path), "whole", _describe(path))
    except (DpmError, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return Found(path.name, _size(path), "damaged", _clean(reason))


def _describe(path: Path) -> str:
    """Say in a few words what a file of ours is. Raises DpmError, OSError or ValueError if it is damaged."""
    if path.name == REPORT:
        report = Report.from_json(read_regular_text(path))
        accuracy = "" if report.slim.accuracy is None else f", {report.slim.accuracy:.2f} % on the test images"
        return _clean(f"{report.arch or 'a model'} with {report.method}{accuracy}")
    if path.name == NAME:
        code = _code_of(read_recipe(read_regular_text(path)))
        return _clean(f"names code that runs: needs --trust ({code})" if code else "every setting of the run")
    if path.name.startswith("slim") and path.suffix == ".pt":
        content = read_model_file(path)
        if not is_slim(content):
            raise ValueError("it holds no slim model")
        return _clean(f"slim model of {parse_content(content, path).metadata.arch or 'a module'}")
    return "what happened when" if path.name == METRICS else "result"


def _read_saved(path: Path) -> _Saved:
    state = read_verified(path) or {}
    stage, step = state.get("stage"), state.get("step")
    if not (isinstance(stage, int) and isinstance(step, int) and stage >= 0 and step >= 0):
        return _Saved(None, "")
    return _Saved(f"stage {stage + 1}, after step {step}", str(state.get("recipe")))


def _list_saved(path: Path, saved: _Saved) -> Found:
    try:
        require_ours({path: MAGIC})
    except OutputError as error:
        return Found(path.name, _size(path), "foreign", _clean(error))
    if saved.position is None:
        return Found(path.name, _size(path), "damaged", "it cannot be read, or fails its checksum")
    return Found(path.name, _size(path), "whole", saved.position)


def _require_all(place: Path) -> None:
    """Raise OutputError that names a result of report.json that is not there, or of another size."""
    report = Report.from_json(read_regular_text(place / REPORT))
    sizes = {Path(each.path).name: each.bytes for each in report.exports}
    for name in (*(Path(path).name for path in report.files.values()), *sizes):
        path = place / name
        for part in parts_of(path):
            if not part.is_file():
                raise OutputError(f"{_clean(part)} is missing; run again with --overwrite")
        if name in sizes and size_of(path) != sizes[name]:
            raise OutputError(
                f"{_clean(path)} has {size_of(path)} bytes, and {REPORT} says {sizes[name]}; run again with --overwrite"
            )


def _size(path: Path) -> int:
    try:
        found = path.lstat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


# ------------------------------------------------------------------------------------------------------------ what next


def _advise(newest: Path, saved: Mapping[Path, _Saved]) -> str:
    """Say how an unfinished run goes on. Raises OutputError if its checkpoints are damaged."""
    there = [path for path in (newest, previous_of(newest)) if path in saved]
    path = next((path for path in there if saved[path].position is not None), None)
    if path is None:
        names = " and ".join(map(str, there))
        raise OutputError(f"{names} cannot be read or fail their checksum; start again with --overwrite")
    try:
        recipe = read_recipe(saved[path].recipe)
        trust, made = _code_of(recipe), f"{recipe.model.arch} on {recipe.data.name}"
    except RecipeError:
        trust, made = "", "with settings that this version cannot read"
    if newest.name == CHECKPOINT:
        kind, command = "run", _resume(newest.parent)
    else:
        model = newest.with_name(f"{newest.name.removesuffix(TRAINING)}.pt")
        kind, command = "training", f"dpm train {_quote('-o', model, '--resume')}"
    instead = "" if path == newest else f" (from {path.name}, as the newest is damaged or missing)"
    return f"unfinished {kind}, {made}, {saved[path].position}{instead}: {command}{' --trust' if trust else ''} goes on"


def _resume(place: Path) -> str:
    """Name the command that resumes the run in a folder, with its model if that is known."""
    model = read_model(place)
    given = _quote(model) if model and model.isprintable() and len(model) < LONGEST else "MODEL"
    recipe = "" if (place / NAME).is_file() else " -r RECIPE"
    return f"dpm prune {given}{recipe} {_quote('-o', place, '--resume')}"


def _code_of(recipe: Recipe) -> str:
    return ", ".join(f"{setting}: {name}" for setting, name in recipe.code.items())


def _quote(*words: object) -> str:
    return shlex.join(str(word) for word in words)


def _clean(text: Any) -> str:
    """Replace what would steer a terminal, such as in the name of a file, and cut what is too long to read."""
    return "".join(char if char.isprintable() else "?" for char in str(text))[:LONGEST]

"""Check that a checkpoint belongs to the run that resumes from it."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dpm_cli.data import Splits
from dpm_cli.engine.checkpoint import load_checkpoint
from dpm_cli.engine.digest import digest
from dpm_cli.errors import OutputError, one_line
from dpm_cli.recipe import Recipe, dump_recipe
from dpm_cli.recipe.reader import read_recipe

WAY_OUT = "resume with the same, or --overwrite"


@dataclass(frozen=True)
class Origin:
    """Identifies what a run starts from. A resumed run and all processes must agree on it."""

    recipe: str  # without exports and stores, so that a failed one costs no training
    weights: str  # digest
    data: Mapping[str, str]  # name of a split -> number of images and digest

    @classmethod
    def of(cls, recipe: Recipe, model: nn.Module, splits: Splits) -> "Origin":
        settings = dump_recipe(recipe.model_copy(update={"export": (), "opset": 18, "track": ()}))
        return cls(settings, digest(model.state_dict()), dict(splits.fingerprints))

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "weights": self.weights, "data": dict(self.data)}

    def require_same(self, state: Mapping[str, Any], path: Path) -> None:
        """Raise OutputError if the checkpoint at `path` differs, and name the difference."""
        with foreign_state(path):
            there = Origin(str(state["recipe"]), str(state["weights"]), dict(state["data"]))
        if there.recipe != self.recipe:
            changed = _changed_lines(there.recipe, self.recipe)
            raise OutputError(
                f"{path} was made with another recipe ({changed}): resume with the same one, or --overwrite"
            )
        require_same_weights(there.weights, self.weights, path)
        if there.data != self.data:
            raise OutputError(f"{path} was made with other data ({_changed_data(there.data, self.data)}): {WAY_OUT}")


def require_same_weights(there: str, here: str, path: Path) -> None:
    """Raise OutputError if what `path` tells of began with other weights. there, here: digests."""
    if there != here:
        raise OutputError(f"{path} was made from another model file: {WAY_OUT}")


@contextlib.contextmanager
def foreign_state(path: Path) -> Iterator[None]:
    """Turn errors while reading a checkpoint into one line; a valid checksum does not prove who wrote it."""
    try:
        yield
    except Exception as error:  # foreign content may raise anything
        raise OutputError(
            f"{path} holds no state that this run can continue from ({one_line(error)}): start anew with --overwrite"
        ) from None


def read_begun(checkpoint: Path) -> Recipe | None:
    """Return the settings that an unfinished run began with, from its checkpoint; None if there is no checkpoint.

    Raises RunError or OutputError if it is damaged or holds none.
    """
    found = load_checkpoint(checkpoint)
    if found is None:
        return None
    with foreign_state(found.path):
        return read_recipe(str(found.state["recipe"]), name=str(found.path))


def _changed_lines(old: str, new: str) -> str:
    """Find the first setting that differs, for a message."""
    for left, right in zip(old.splitlines(), new.splitlines()):
        if left != right:
            return f"{left.strip()[:100]} there, {right.strip()[:100]} here"
    return "more settings in one of them"


def _changed_data(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Find the first set of images that differs, for a message."""
    for name, here in new.items():
        there = str(old.get(name, "none"))
        if there != here:
            left, right = (text.partition(",")[0][:100] for text in (there, here))
            return f"{name}: {left} there, {right} here" if left != right else f"{name}: {left}, but not the same"
    return "more of it there"

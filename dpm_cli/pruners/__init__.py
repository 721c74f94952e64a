"""Base pruners: one method, one file; they never import each other."""

from typing import Literal

from dpm_cli.pruners.base import BasePruner
from dpm_cli.pruners.depgraph import DepGraph, Normalizer

__all__ = ["BasePruner", "DepGraph", "make_base"]


def make_base(name: Literal["depgraph"], *, normalizer: Normalizer, strength: float) -> BasePruner:
    """A base pruner by its name in the recipe."""
    match name:
        case "depgraph":
            return DepGraph(normalizer=normalizer, strength=strength)

"""Base pruners: one method, one file; they never import each other."""

from dpm_cli.pruners.base import BasePruner
from dpm_cli.pruners.depgraph import DepGraph, Normalizer
from dpm_cli.recipe import Recipe

__all__ = ["BasePruner", "DepGraph", "Normalizer", "make_base"]


def make_base(recipe: Recipe) -> BasePruner:
    """The base pruner that a recipe names."""
    prune = recipe.prune
    match prune.base:
        case "depgraph":
            return DepGraph(
                normalizer=prune.normalizer or ("max" if prune.sparse_epochs else "mean"),
                strength=prune.sparse_strength,
            )

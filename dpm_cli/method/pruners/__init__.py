"""Base pruners: one method, one file; they never import each other."""

from dpm_cli.method.pruners.base import BasePruner
from dpm_cli.method.pruners.depgraph import DepGraph
from dpm_cli.method.pruners.gate_decorator import GateDecorator
from dpm_cli.method.pruners.otov2 import Otov2
from dpm_cli.recipe import Recipe
from dpm_cli.sparse.on_the_fly import OnTheFly

__all__ = ["BasePruner", "DepGraph", "GateDecorator", "OnTheFly", "Otov2", "make_base"]


def make_base(recipe: Recipe) -> BasePruner:
    """The base pruner that a recipe names."""
    prune = recipe.prune
    match prune.base:
        case "depgraph":
            return DepGraph(
                importance=prune.importance,
                normalizer=prune.normalizer or ("max" if prune.sparse_epochs else "mean"),
                penalty=prune.penalty,
                strength=prune.sparse_strength,
                growth=prune.sparse_growth,
                observe_steps=prune.observe_steps,
                seed=recipe.seed,
            )
        case "otov2":
            by_adam = recipe.train.optimizer != "sgd"
            settings = prune.otov2
            return Otov2(
                variant=settings.variant,
                strength=settings.strength,
                least_strength=1e-2 if by_adam else 1e-3,
                amplify=settings.amplify or (20.0 if by_adam else 2.0),
                ceiling=settings.ceiling or (1e3 if by_adam else 10.0),
                epsilon=settings.epsilon,
                tolerance=settings.tolerance,
                decoupled_decay=recipe.train.weight_decay if recipe.train.optimizer == "adamw" else 0.0,
            )
        case "gate-decorator":
            return GateDecorator(strength=prune.gates.strength, min_keep=prune.min_keep, fraction=prune.gates.fraction)
        case "on-the-fly":
            sparse = prune.on_the_fly
            return OnTheFly(
                penalty=sparse.penalty,
                strength=sparse.strength,
                sparsity=(prune.target.sparsity or (0.0,))[0],
                per=sparse.per,
                epochs=recipe.train.epochs,
                keep=prune.keep,
                keep_first=sparse.keep_first,
            )

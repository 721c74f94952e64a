"""Collect the base pruners: one method per file; methods never import each other."""

from dpm_cli.errors import UsageError
from dpm_cli.method.pruners.base import BasePruner, Pace
from dpm_cli.method.pruners.depgraph import DepGraph
from dpm_cli.method.pruners.gate_decorator import GateDecorator
from dpm_cli.method.pruners.otov2 import Otov2
from dpm_cli.recipe.sections import Prune, Training

__all__ = ["BasePruner", "DepGraph", "GateDecorator", "Otov2", "Pace", "make_base"]


def make_base(prune: Prune, training: Training, *, seed: int) -> BasePruner:
    """Make the base pruner that `prune.base` names. training: settings of its main stage."""
    match prune.base:
        case "depgraph":
            return DepGraph(prune, training, seed=seed)
        case "otov2":
            return Otov2(prune, training)
        case "gate-decorator":
            return GateDecorator(prune, training)
        case "on-the-fly":
            raise UsageError("prune.base is on-the-fly, which cuts single weights; the others remove whole units")

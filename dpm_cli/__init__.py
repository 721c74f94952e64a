"""Prune a trained PyTorch vision model with the Decay Pruning Method and export verified files.

    report = dpm_cli.prune("model.pt", "cifar10.yaml", output="out")
    module = dpm_cli.load("out/slim.pt")

Every public name is imported at its first use, so `import dpm_cli` is instant and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpm_cli.api import evaluate, export, inspect, prune, train
    from dpm_cli.errors import DpmError
    from dpm_cli.models import load
    from dpm_cli.recipe import Recipe, load_recipe
    from dpm_cli.report import Report

__all__ = [
    "DpmError",
    "Recipe",
    "Report",
    "evaluate",
    "export",
    "inspect",
    "load",
    "load_recipe",
    "prune",
    "train",
]

_HOMES = {
    "dpm_cli.api": ("evaluate", "export", "inspect", "prune", "train"),
    "dpm_cli.errors": ("DpmError",),
    "dpm_cli.models": ("load",),
    "dpm_cli.recipe": ("Recipe", "load_recipe"),
    "dpm_cli.report": ("Report",),
}


def __getattr__(name: str) -> Any:
    """Import a public name's module. All names of that module are set at once: importing `dpm_cli.api` also imports the
    folder `dpm_cli.export`, which Python then stores under the name of the public function."""
    for home, names in _HOMES.items():
        if name in names:
            module = import_module(home)
            globals().update({each: getattr(module, each) for each in names})
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

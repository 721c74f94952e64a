"""Prune a trained PyTorch vision model with the Decay Pruning Method and export verified files.

    report = dpm_cli.prune("model.pt", "cifar10.yaml", output="out")
    module = dpm_cli.load("out/slim.pt")

In a training loop of your own, `dpm_cli.Pruner` does the same (examples/plain_loop.py).

Every public name is imported at its first use, so `import dpm_cli` is instant and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpm_cli.errors import DpmError
    from dpm_cli.jobs.benchmark import benchmark
    from dpm_cli.jobs.draft import init
    from dpm_cli.jobs.evaluate import evaluate
    from dpm_cli.jobs.export import export_slim
    from dpm_cli.jobs.inspect import inspect
    from dpm_cli.jobs.predict import predict, prepare, read_metadata
    from dpm_cli.jobs.prune import prune
    from dpm_cli.jobs.save import save
    from dpm_cli.jobs.train import train
    from dpm_cli.method.pruner import Pruner
    from dpm_cli.models import load
    from dpm_cli.recipe import Recipe, load_recipe
    from dpm_cli.report import Report

__all__ = [
    "DpmError",
    "Pruner",
    "Recipe",
    "Report",
    "benchmark",
    "evaluate",
    "export_slim",
    "init",
    "inspect",
    "load",
    "load_recipe",
    "predict",
    "prepare",
    "prune",
    "read_metadata",
    "save",
    "train",
]

_HOMES = {
    "dpm_cli.errors": ("DpmError",),
    "dpm_cli.jobs.benchmark": ("benchmark",),
    "dpm_cli.jobs.draft": ("init",),
    "dpm_cli.jobs.evaluate": ("evaluate",),
    "dpm_cli.jobs.export": ("export_slim",),
    "dpm_cli.jobs.inspect": ("inspect",),
    "dpm_cli.jobs.predict": ("predict", "prepare", "read_metadata"),
    "dpm_cli.jobs.prune": ("prune",),
    "dpm_cli.jobs.save": ("save",),
    "dpm_cli.jobs.train": ("train",),
    "dpm_cli.method.pruner": ("Pruner",),
    "dpm_cli.models": ("load",),
    "dpm_cli.recipe": ("Recipe", "load_recipe"),
    "dpm_cli.report": ("Report",),
}


def __getattr__(name: str) -> Any:
    """Import a public name's module at the first use of the name."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

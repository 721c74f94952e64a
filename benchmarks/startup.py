"""What comes before the first training step: the export, the analysis, a round's victims, `dpm --help`.

    python benchmarks/startup.py           ours
    python benchmarks/startup.py --peer    also densenet201, from model to compacted model, in turns with Torch-Pruning

The export is torch.export's own time; the analysis is everything else in find_groups. One thread, random weights.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from common import paired_ratio, print_table, save, time_in_turns
from torch import nn

import dpm_cli.graph.analysis as tracing
from dpm_cli.graph import compact_, find_groups
from dpm_cli.graph.program import export as export_program
from dpm_cli.method.budget import choose_victims, find_width_limits, resolve_limit
from dpm_cli.method.pruners.depgraph import GroupImportance
from dpm_cli.models import build

SHAPE = (3, 224, 224)
MODELS = ("torchvision:resnet50", "torchvision:densenet201")


class Stopwatch:
    """Adds up the seconds of the calls of a function."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.seconds = call, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return self.call(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - started


def measure(arch: str, turns: int) -> dict[str, Any]:
    """Medians over fresh models; the first turn warms up."""
    model = build(arch, classes=10, shape=SHAPE).eval()
    example = torch.zeros(2, *SHAPE)
    exports, analyses, choices = [], [], []
    for _ in range(turns + 1):
        with patch.object(tracing, "export", Stopwatch(export_program)) as export:
            watch = Stopwatch(find_groups)
            groups = watch(model, example)
        exports.append(export.seconds)
        analyses.append(watch.seconds - export.seconds)
        widths = find_width_limits(groups, round_to=8, min_keep=0.1)
        limit = resolve_limit(groups, widths, kind="macs", amount=0.5)
        scores = GroupImportance(groups, model).scores("mean")
        watch = Stopwatch(choose_victims)
        watch(groups, widths, scores, kind="macs", limit=limit)
        choices.append(watch.seconds)
    return {
        "model": arch,
        "units": groups.units,
        "export s": statistics.median(exports[1:]),
        "analysis s": statistics.median(analyses[1:]),
        "choosing victims ms": 1e3 * statistics.median(choices[1:]),
    }


def prune(model: nn.Module) -> None:
    example = torch.zeros(2, *SHAPE)
    groups = find_groups(model, example)
    widths = find_width_limits(groups, round_to=8, min_keep=0.1)
    limit = resolve_limit(groups, widths, kind="macs", amount=0.5)
    victims = choose_victims(groups, widths, GroupImportance(groups, model).scores("mean"), kind="macs", limit=limit)
    compact_(model, groups, ~victims)


def prune_by_peer(model: nn.Module) -> None:
    import torch_pruning as tp  # type: ignore[import-untyped]

    tp.pruner.GroupNormPruner(
        model,
        torch.zeros(2, *SHAPE),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.3,
        global_pruning=True,
        round_to=8,
        ignored_layers=[[module for module in model.modules() if isinstance(module, nn.Linear)][-1]],
    ).step()


def compare(turns: int) -> dict[str, Any]:
    def fresh(prune: Callable[[nn.Module], None]) -> Callable[[], None]:
        models = [build(MODELS[1], classes=10, shape=SHAPE).eval() for _ in range(turns)]
        return lambda: prune(models.pop())

    times = time_in_turns({"peer": fresh(prune_by_peer), "ours": fresh(prune)}, turns=turns, warm_up=0)
    return {
        "model -> compacted model": MODELS[1],
        "torch-pruning s": statistics.median(times["peer"]),
        "dpm s": statistics.median(times["ours"]),
        "times faster": paired_ratio(times, "peer", "ours"),
    }


def measure_help(turns: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "dpm_cli", "--help"]
    call = {"help": lambda: subprocess.run(command, capture_output=True, check=True)}
    return {"dpm --help s": statistics.median(time_in_turns(call, turns=turns)["help"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--peer", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables = [[measure(arch, arguments.turns) for arch in MODELS], [measure_help(arguments.turns)]]
    if arguments.peer:
        tables.append([compare(turns=2)])
    for rows in tables:
        print_table(rows)
    save("startup", [row for rows in tables for row in rows], turns=arguments.turns)


if __name__ == "__main__":
    main()

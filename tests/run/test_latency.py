import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from digits_recipe import recipe
from torch import nn

import dpm_cli
from dpm_cli.errors import RecipeError, TargetError, UsageError
from dpm_cli.export.probe import Operator, find_operators, time_operator
from dpm_cli.graph import Cost, find_groups
from dpm_cli.graph.labels import Flags
from dpm_cli.method.budget import find_width_limits
from dpm_cli.method.pruners import make_base
from dpm_cli.method.survey import survey
from dpm_cli.models import build
from dpm_cli.recipe import load_recipe
from dpm_cli.recipe.deployment import Latency
from dpm_cli.recipe.sections import Prune, Training
from dpm_cli.run.latency import Compared, Stopwatch, load_or_time
from dpm_cli.run.latency_table import Grid, LatencyCost, Timed


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def test_operators_are_found_by_their_weights_with_what_they_read(net: nn.Module) -> None:
    found = find_operators(net, torch.zeros(2, 3, 8, 8))
    assert {name: (each.weight, each.reads) for name, each in found.items()} == {
        "0.weight": ((8, 3, 3, 3), (2, 3, 8, 8)),
        "2.weight": ((8, 8, 1, 1), (2, 8, 6, 6)),
        "5.weight": ((4, 8), (2, 8)),
    }


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_dearer_operator_takes_longer(net: nn.Module, runtime: str) -> None:
    small, large = (
        find_operators(nn.Conv2d(width, width, 3, padding=1), torch.zeros(1, width, 24, 24))["weight"]
        for width in (8, 64)
    )
    assert time_operator(small, runtime=runtime, threads=1) < time_operator(large, runtime=runtime, threads=1)


def test_resized_operators_read_what_their_layers_would() -> None:
    grouped = Operator((12, 3, 3, 3), (1, 6, 8, 8), (1, 1), (1, 1), (1, 1), groups=2)
    assert grouped.resize(8, 2) == replace(grouped, weight=(8, 2, 3, 3), reads=(1, 4, 8, 8))
    depthwise = Operator((12, 1, 3, 3), (1, 12, 8, 8), (1, 1), (1, 1), (1, 1), groups=12)
    assert depthwise.resize(4, 1) == replace(depthwise, weight=(4, 1, 3, 3), reads=(1, 4, 8, 8), groups=4)
    assert Operator((4, 8), (1, 5, 8)).resize(4, 6) == Operator((4, 6), (1, 5, 6))


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
@pytest.mark.thorough
def test_narrow_structure_takes_less_than_the_dense_one_in_turns(net: nn.Module, runtime: str) -> None:
    groups = find_groups(net, torch.zeros(2, 3, 64, 64))
    stopwatch = Stopwatch(net, groups, Latency.model_validate({"runtime": runtime, "batch": 4}), (3, 64, 64))
    narrow = stopwatch.shrink(np.isin(np.arange(groups.units), [0, 8]))
    ratio, dense, _ = stopwatch.compare(narrow)
    assert 0 < ratio < 1
    assert dense > 0


@pytest.mark.gpu
def test_torch_on_cuda_is_timed_on_the_device_of_the_run(net: nn.Module) -> None:
    device = torch.device("cuda:0")
    groups = find_groups(net, torch.zeros(2, 3, 64, 64))
    stopwatch = Stopwatch(net, groups, Latency(runtime="torch", batch=8), (3, 64, 64), device)
    timed = stopwatch.time_all(find_width_limits(groups, round_to=4, min_keep=0.5))
    assert all(time > 0 for grid in timed.table.values() for row in grid.times for time in row)
    assert stopwatch.compare(stopwatch.shrink(np.isin(np.arange(groups.units), [0, 8])))[0] > 0
    assert next(net.parameters()).device == torch.device("cpu")  # the model itself stays where it is


def test_prediction_agrees_with_both_measured_ends_and_lies_between_timed_widths(net: nn.Module) -> None:
    groups = find_groups(net, torch.zeros(2, 3, 8, 8))
    everything, half = np.ones(groups.units, bool), np.arange(groups.units) % 2 == 0
    table = {
        "0.weight": Grid([4, 8], [3], [[10.0], [20.0]]),
        "2.weight": Grid([4, 8], [4, 8], [[30.0, 50.0], [30.0, 80.0]]),
    }
    cost = LatencyCost(Timed(table, 150.0, 90.0), groups.cost, half)
    assert (cost.count(groups.cost, everything), cost.count(groups.cost, half)) == (150, 90)
    cost.gain = 1.0
    six = np.concatenate([np.arange(8) < 6, np.ones(groups.units - 8, bool)])  # of the first layer's 8 outputs
    rest = {
        name: 50 * groups.cost.sizes(alive).sum() / groups.cost.sizes(everything).sum()  # what no operator explains
        for name, alive in (("half", half), ("six", six))
    }
    assert cost.count(groups.cost, half) == round(10 + 30 + rest["half"])
    assert cost.count(groups.cost, six) == round(15 + 55 + rest["six"])
    cost.correct_(100.0, groups.cost, half)
    assert cost.count(groups.cost, half) == 100
    smaller = groups.survivors(half)  # after a removal the same structure costs the same
    assert cost.count(smaller.cost, np.ones(smaller.units, bool)) == 100


def test_table_is_remembered_and_another_machine_measures_anew(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = find_groups(net, torch.zeros(2, 3, 8, 8))
    widths = find_width_limits(groups, round_to=1, min_keep=0.5)
    stopwatch, calls = Stopwatch(net, groups, Latency(), (3, 8, 8)), []
    table = {"0.weight": Grid([4, 8], [3], [[1.0], [2.0]])}
    monkeypatch.setattr(stopwatch, "time_all", lambda _: calls.append(1) or Timed(table, 9.0, 5.0))
    first, second = (load_or_time(stopwatch, widths, cache=tmp_path) for _ in range(2))
    assert (first, len(calls)) == (second, 1)
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    content["machine"]["cpu"] = "another"
    file.write_text(json.dumps(content))
    load_or_time(stopwatch, widths, cache=tmp_path)
    file.write_text("damaged")
    load_or_time(stopwatch, widths, cache=tmp_path)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("latency", "read"), [("12ms", 12e6), ("0.5 ms", 5e5), ("800us", 8e5), ("0.6", 0.6), ("1.5s", 1.5e9)]
)
def test_times_have_units(latency: str, read: float) -> None:
    assert load_recipe("digits", [f"prune.target.latency={latency}"]).prune.target.latency == pytest.approx(read)


@pytest.mark.parametrize("latency", ["12", "12 parsecs", "1.0", "-1ms", "0ms"])
def test_times_without_a_known_unit_are_refused(latency: str) -> None:
    with pytest.raises(RecipeError, match=r"a fraction to keep such as 0.6, or a time in us, ms or s such as 12ms"):
        load_recipe("digits", [f"prune.target.latency={latency}"])


def test_loops_of_others_cannot_aim_at_latency(net: nn.Module) -> None:
    with pytest.raises(UsageError, match="target latency is measured on exports"):
        dpm_cli.Pruner(net, torch.zeros(2, 3, 8, 8), target={"latency": 0.5}, steps=0)


def test_operators_that_take_longer_alone_than_the_whole_do_not_change_what_dense_costs(net: nn.Module) -> None:
    groups = find_groups(net, torch.zeros(2, 3, 8, 8))
    everything, half = np.ones(groups.units, bool), np.arange(groups.units) % 2 == 0
    table = {"0.weight": Grid([4, 8], [3], [[100.0], [300.0]])}
    cost = LatencyCost(Timed(table, 150.0, 90.0), groups.cost, half)
    assert (cost.count(groups.cost, everything), cost.count(groups.cost, half)) == (150, 90)


def test_every_operator_is_timed_at_the_widths_that_it_can_have(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = find_groups(net, torch.zeros(2, 3, 8, 8))
    stopwatch = Stopwatch(net, groups, Latency(), (3, 8, 8))
    monkeypatch.setattr(stopwatch, "compare", lambda slim: Compared(0.5, 100.0))
    timed = stopwatch.time_all(find_width_limits(groups, round_to=2, min_keep=0.5))
    assert {name: (grid.outputs, grid.inputs) for name, grid in timed.table.items()} == {
        "0.weight": ([4, 6, 8], [3]),
        "2.weight": ([4, 6, 8], [4, 6, 8]),
        "5.weight": ([4], [4, 6, 8]),
    }
    assert (timed.dense, timed.lowest) == (100.0, 50.0)


@dataclass
class Widest:
    """Costs what the widest group has left."""

    floor: int

    def count(self, cost: Cost, alive: Flags) -> int:
        return max(int(alive[:16].sum()), self.floor)

    def __str__(self) -> str:
        return "latency"


@pytest.mark.parametrize(("asked", "amount", "round_to"), [("auto", 0.6, 8), ("auto", 0.3, 4), ("auto", 0.05, 2)])
def test_automatic_rounding_is_the_coarsest_whose_measured_latency_meets_the_target(
    asked: str, amount: float, round_to: int
) -> None:
    # Below 2 of 16 units nothing gets faster: then the coarsest of the fastest steps says what can be reached.
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 3, 1)).eval()
    prune = Prune.model_validate({"target": {"latency": amount}, "round_to": asked, "min_keep": 0.05})
    make: Callable[..., Widest] = lambda module, groups, widths: Widest(floor=2)  # noqa: E731
    base = make_base(prune, Training(), seed=0)
    found = survey(net, torch.zeros(2, 3, 4, 4), prune, base, time_widths=make)
    assert found.round_to == round_to


@pytest.mark.slow
def test_run_meets_a_latency_of_its_real_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    net = build("digits", classes=10, shape=(1, 8, 8))
    settings = recipe(
        prune={"target": {"latency": 0.75}, "round_to": 8, "latency": {"batch": 32}}, compact={"fold_mean": False}
    )
    report = dpm_cli.prune(net, settings, output=tmp_path / "out")
    assert (report.target.kind, report.target.is_met) == ("latency", True)
    (ratio,) = re.findall(r"batch 32, 1 thread: the export takes (\S+) of the dense one's", " ".join(report.notes))
    assert 0.5 < float(ratio) <= 0.75 * 1.03
    changed = settings["prune"] | {"target": {"latency": 0.001}}
    with pytest.raises(TargetError, match=r"target latency 0.001 \(.* ms\) cannot be met: between .* ms"):
        dpm_cli.prune(net, settings | {"prune": changed}, output=tmp_path / "other")

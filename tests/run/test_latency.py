import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from digits_recipe import recipe
from torch import nn

import dpm_cli
from dpm_cli.errors import RecipeError, TargetError, UsageError
from dpm_cli.export.probe import find_operators, time_operator
from dpm_cli.graph import find_groups
from dpm_cli.method.budget import find_width_limits
from dpm_cli.models import build
from dpm_cli.recipe import load_recipe
from dpm_cli.recipe.deployment import Latency
from dpm_cli.run.latency import LatencyCost, Stopwatch, Timed, load_or_time, table_sum


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


def test_dearer_operator_takes_longer(net: nn.Module) -> None:
    small, large = (
        find_operators(nn.Conv2d(width, width, 3, padding=1), torch.zeros(1, width, 24, 24))["weight"]
        for width in (8, 64)
    )
    assert time_operator(small, runtime="onnxruntime", threads=1) < time_operator(
        large, runtime="onnxruntime", threads=1
    )


def test_prediction_agrees_with_both_measured_ends(net: nn.Module) -> None:
    groups = find_groups(net, torch.zeros(2, 3, 8, 8))
    everything, half = np.ones(groups.units, bool), np.arange(groups.units) % 2 == 0
    table = {"0.weight": ([108, 216], [10.0, 20.0]), "2.weight": ([16, 64], [30.0, 80.0])}
    rest = table_sum(table, 150.0, groups.cost, everything, groups.units) - 100.0
    assert rest == pytest.approx(50.0)  # what the operators do not explain
    by_table = table_sum(table, 150.0, groups.cost, half, groups.units)
    assert by_table == pytest.approx(10 + 30 + 25)
    cost = LatencyCost(Timed(table, 150.0, 90.0, by_table), groups.units)
    assert (cost.count(groups.cost, everything), cost.count(groups.cost, half)) == (150, 90)
    cost.correct_(100.0, by_table)
    assert cost.count(groups.cost, half) == 100
    smaller = groups.survivors(half)  # after a removal the same structure costs the same
    assert cost.count(smaller.cost, np.ones(smaller.units, bool)) == 100


def test_table_is_remembered_and_another_machine_measures_anew(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = find_groups(net, torch.zeros(2, 3, 8, 8))
    widths = find_width_limits(groups, round_to=1, min_keep=0.5)
    stopwatch, calls = Stopwatch(net, groups, Latency(), (3, 8, 8)), []
    table = {"0.weight": ([108, 216], [1.0, 2.0])}
    monkeypatch.setattr(stopwatch, "time_all", lambda _: calls.append(1) or Timed(table, 9.0, 5.0, 6.0))
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

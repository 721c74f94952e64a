"""Latency targets with every base pruner and over interruptions. A clock that counts MACs makes them repeatable."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_recipe import recipe
from torch import nn

import dpm_cli
from dpm_cli.errors import Interrupted
from dpm_cli.measure import count_macs
from dpm_cli.models import build, load_slim
from dpm_cli.report import Report
from dpm_cli.run.latency import ABOVE, BELOW, Compared, Stopwatch

pytestmark = pytest.mark.thorough  # trains
SHARE = 0.75
IMAGE = torch.zeros(1, 1, 8, 8)
BASES: dict[str, dict[str, Any]] = {
    "depgraph": {"base": "depgraph", "rounds": 2},
    "otov2": {"base": "otov2", "otov2": {"strength": 3.0}, "rounds": "auto"},
    "gate-decorator": {"base": "gate-decorator", "gates": {"tick_lr": 0.01}, "rounds": 2},
}


def taken(slim: nn.Module, dense: nn.Module) -> float:
    """A fifth of the time is overhead, the rest goes with the MACs, so a table of operators alone is wrong."""
    return 0.2 + 0.8 * count_macs(slim, IMAGE) / count_macs(dense, IMAGE)


@pytest.fixture(autouse=True)
def _clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Stopwatch, "compare", lambda self, slim: Compared(taken(slim, self.module), 1e6, "it waited"))

    def time_operator(operator: Any, **_: Any) -> float:
        if operator is None:
            return 0.0
        return 1e6 * torch.Size(operator.weight).numel() * torch.Size(operator.reads[2:]).numel() / 2e6

    monkeypatch.setattr("dpm_cli.run.latency.time_operator", time_operator)


def settings(base: str) -> dict[str, Any]:
    return recipe(
        prune=BASES[base] | {"target": {"latency": SHARE}, "round_to": 1},
        decay={"steps": "auto"},
        train={"epochs": 6},
        compact={"fold_mean": False},
    )


def dense_net() -> nn.Module:
    torch.manual_seed(0)
    return build("digits", classes=10, shape=(1, 8, 8)).eval()


def go(base: str, folder: Path, **options: Any) -> Report:
    return dpm_cli.prune(dense_net(), settings(base), output=folder, device="cpu", **options)


@pytest.mark.parametrize("base", BASES)
def test_every_base_meets_a_latency_and_keeps_what_it_allows(base: str, tmp_path: Path) -> None:
    report = go(base, tmp_path / "out")
    left = taken(load_slim(tmp_path / "out" / "slim.pt").module, dense_net())
    assert report.target.kind == "latency"
    assert report.target.is_met
    assert SHARE * (1 - 2 * BELOW) <= left <= SHARE * (1 + ABOVE)
    (note,) = (note for note in report.notes if "the export takes" in note)
    assert f"the export takes {left:.3f} of the dense one's" in note
    assert note.endswith("this may be wrong: it waited")


@pytest.mark.parametrize("base", BASES)
def test_interrupted_runs_go_on_to_the_same_bits(base: str, tmp_path: Path) -> None:
    go(base, tmp_path / "whole")
    steps, runs = count(1), 0
    while not (tmp_path / "parts" / "report.json").exists():
        runs += 1
        try:
            go(base, tmp_path / "parts", resume=runs > 1, should_stop=lambda: next(steps) % 5 == 0)
        except Interrupted:
            continue
    whole, parts = (load_slim(tmp_path / name / "slim.pt").module.state_dict() for name in ("whole", "parts"))
    assert runs > 3
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

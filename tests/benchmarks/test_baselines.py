"""Baselines are what their names say, and cost what the other arms cost."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpm_cli.graph import find_groups
from dpm_cli.models import build
from dpm_cli.recipe import load_recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the repository's benchmarks")


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("baselines")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(build("digits", classes=10, shape=(1, 8, 8)).state_dict(), tmp_path / "dense.pt")
    return tmp_path / "dense.pt"


@pytest.mark.parametrize("baseline", ["SFP", "ASFP", "uniform", "from scratch", "searched"])
def test_every_baseline_trains_and_fills_the_target(baselines: Any, dense: Path, baseline: str) -> None:
    recipe = load_recipe("digits", ["prune.round_to=1", "finetune.epochs=0"]).model_dump(exclude_unset=True)
    output = dense.parent / "out"
    baselines.run_baseline(baseline, dense, recipe, epochs=4, output=output)
    report = json.loads((output / "report.json").read_text())
    assert 0.44 < report["slim"]["macs"] / report["dense"]["macs"] <= 0.45
    assert report["slim"]["params"] < report["dense"]["params"]
    assert report["slim"]["accuracy"] > 30 > report["dense"]["accuracy"]  # four epochs; the dense net is untrained


def test_equal_shares_go_from_every_group(baselines: Any) -> None:
    groups = find_groups(build("digits", classes=10, shape=(1, 8, 8)).eval(), torch.zeros(2, 1, 8, 8))
    scores = np.random.default_rng(0).random(groups.units) * groups.group_of_unit  # groups of other sizes of score
    ranks = baselines.rank_within(groups, scores)
    assert len(groups) > 1
    for group in groups:
        assert sorted(ranks[group.range]) == pytest.approx((np.arange(group.size) + 1) / group.size)
        assert np.array_equal(np.argsort(ranks[group.range]), np.argsort(scores[group.range], kind="stable"))


def test_asymptotic_pruning_ends_at_the_target(baselines: Any) -> None:
    shares = [baselines.fall(epoch, 6) for epoch in range(6)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[1] == pytest.approx(0.75, abs=0.02)


def test_the_search_finds_better_shares_than_the_plain_cut(baselines: Any) -> None:
    groups = find_groups(build("digits", classes=10, shape=(1, 8, 8)).eval(), torch.zeros(2, 1, 8, 8))
    scores = np.random.default_rng(0).random(groups.units)

    def take_half(factors: Any) -> Any:
        return scores * factors < np.median(scores * factors)

    def lost_of_the_first_group(victims: Any) -> float:
        return float(victims[next(iter(groups)).range].sum())

    plain = take_half(np.ones(groups.units))
    found = baselines.search_shares(groups, take_half, lost_of_the_first_group, seed=0)
    assert found.sum() == plain.sum()
    assert lost_of_the_first_group(found) < lost_of_the_first_group(plain)

"""Benchmarks that train for hours ask only for settings that recipes have."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import dpm_cli
from dpm_cli.method.schedule import plan_schedule
from dpm_cli.recipe import Recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the repository's benchmarks")


@pytest.fixture(autouse=True)
def _beside_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("scale", ["cpu", "gpu", "gpu-short-vit"])
def test_every_trial_is_a_recipe(scale: str) -> None:
    paired: Any = importlib.import_module("paired")
    trials = list(paired.list_trials(paired.SCALES[scale], list(paired.ARMS), []))
    assert len({trial.folder for trial in trials}) == len(trials) > 100
    for trial in trials:
        recipe = Recipe.model_validate(paired.make_recipe(paired.SCALES[scale], Path("images"), trial))
        assert recipe.prune.target.macs == trial.budget


@pytest.mark.parametrize("scale", ["cpu", "cpu-short"])
def test_what_is_called_the_defaults_is_what_a_recipe_plans_that_says_nothing(scale: str) -> None:
    scales: Any = importlib.import_module("scales")
    paired: Any = importlib.import_module("paired")
    its = scales.SCALES[scale]
    trial = paired.Trial("depgraph", "+ SP, distilled", 0.25, its.nets[0], 100)
    told = paired.make_recipe(its, Path("images"), trial)
    silent = told | {"prune": {"target": told["prune"]["target"]}, "decay": {}, "train": {"epochs": its.epochs}}
    plans = []
    for recipe in map(Recipe.model_validate, (told, silent)):
        rounds = plan_schedule(recipe.prune, recipe.train, recipe.decay, steps_per_epoch=its.images // 128)
        plans.append((rounds.starts, rounds.decay_steps, recipe.decay.rectify, recipe.train))
    assert plans[0] == plans[1]
    assert plans[0][:2] == ((0,), its.decay_steps)


def test_every_setting_that_is_searched_changes_the_recipe() -> None:
    search: Any = importlib.import_module("search")
    attempts = list(search.list_attempts(list(search.SETTINGS), search.SCALE.budgets, 1))
    assert len({attempt.folder for attempt in attempts}) == len(attempts)
    recipes = [Recipe.model_validate(attempt.recipe(Path("images"))) for attempt in attempts]
    texts = {recipe.model_dump_json() for recipe in recipes}
    assert len(texts) == len(search.SETTINGS) * len(search.SCALE.budgets)


def test_arms_on_resnet56_change_the_shipped_recipe() -> None:
    resnet56: Any = importlib.import_module("resnet56")
    recipes = [dpm_cli.load_recipe(resnet56.RECIPE, overrides) for overrides in resnet56.ARMS.values()]
    assert {recipe.train.distill for recipe in recipes} == {0.0, 0.7}


def test_a_measured_trial_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common: Any = importlib.import_module("common")
    paired: Any = importlib.import_module("paired")
    trial = next(paired.list_trials(paired.SCALES["cpu"], ["otov2"], ["cut"]))
    (tmp_path / trial.folder).mkdir()
    slim = {"accuracy": 70.0, "macs": 1, "params": 1}
    report = {"dense": slim, "slim": slim, "units": {"released": 0}, "seconds": {"decay": 2.0, "measure": 1.0}}
    (tmp_path / trial.folder / "report.json").write_text(json.dumps(report))
    row = paired.read(trial, tmp_path)
    assert paired.key_of(row) == trial.key
    assert row["seconds"] == 2.0
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    common.save("paired_cpu", [row], scale="small", threads=1)
    assert common.read_rows("paired_cpu", scale="small") == [row]
    assert common.read_rows("paired_cpu", scale="large") == []

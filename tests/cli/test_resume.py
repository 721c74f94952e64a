"""`--resume` goes on with the settings that the run began with, without typing them again."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from digits_recipe import recipe

import dpm_cli
from dpm_cli.errors import Interrupted
from dpm_cli.models import build


@pytest.fixture
def stopped(tmp_path: Path, dpm: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was begun with `--set` and stopped at its fourth step."""
    monkeypatch.setattr("dpm_cli.jobs.prune.write_page", lambda folder: None)
    torch.manual_seed(0)
    torch.save(build("digits", classes=10, shape=(1, 8, 8)).state_dict(), "model.pt")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe()))
    steps = iter(range(100))
    settings = dpm_cli.load_recipe("mine.yaml", ["prune.target.macs=0.7", "seed=3"])
    with pytest.raises(Interrupted):
        dpm_cli.prune("model.pt", settings, output="out", should_stop=lambda: next(steps) == 3)
    assert not (tmp_path / "out" / "report.json").exists()
    return tmp_path / "out"


@pytest.mark.parametrize("arguments", [["--recipe", "mine.yaml"], []], ids=["recipe", "nothing"])
@pytest.mark.thorough
def test_settings_need_not_be_given_again(stopped: Path, dpm: Any, arguments: list[str]) -> None:
    ended = dpm("prune", "model.pt", *arguments, "-o", "out", "--resume", "--json")
    assert ended.code == 0, ended.err
    report = dpm_cli.Report.from_json((stopped / "report.json").read_text())
    assert (report.target.asked, report.seed) == (0.7, 3)
    again = dpm("prune", "model.pt", *arguments, "-o", "out", "--resume", "--json")
    assert again == ended._replace(err=again.err)


def test_a_recipe_that_was_changed_meanwhile_is_still_refused(stopped: Path, dpm: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe(train={"epochs": 3})))
    ended = dpm("prune", "model.pt", "-r", "mine.yaml", "-o", "out", "--resume")
    assert ended.code == 2
    assert "another recipe" in ended.err


def test_other_settings_are_still_refused(stopped: Path, dpm: Any) -> None:
    ended = dpm("prune", "model.pt", "-r", "mine.yaml", "--set", "seed=4", "-o", "out", "--resume")
    assert ended.code == 2
    assert "another recipe" in ended.err


def test_training_goes_on_with_the_settings_that_it_began_with(dpm: Any, tmp_path: Path) -> None:
    begin = ["--set", "dense.epochs=2", "--set", "seed=3"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe(dense={"epochs": 1})))
    assert dpm("train", "-r", "mine.yaml", *begin, "-o", "whole.pt", "-q").code == 0
    steps = iter(range(100))
    settings = dpm_cli.load_recipe("mine.yaml", begin[1::2])
    with pytest.raises(Interrupted):
        dpm_cli.train(settings, output="model.pt", should_stop=lambda: next(steps) == 3)
    (tmp_path / "mine.yaml").unlink()
    ended = dpm("train", "-o", "model.pt", "--resume", "-q")
    assert ended.code == 0, ended.err
    whole, model = (torch.load(tmp_path / name) for name in ("whole.pt", "model.pt"))
    assert all(torch.equal(whole[name], model[name]) for name in whole)


@pytest.mark.parametrize("arguments", [["-r", "digits"], []], ids=["recipe", "nothing"])
def test_finished_training_is_not_resumed_and_stays(dpm: Any, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "tr ain.pt").write_bytes(b"weights")
    ended = dpm("train", *arguments, "-o", "tr ain.pt", "--resume")
    said = "error: tr ain.pt exists and no training of it is unfinished: use it, or --overwrite to train again\n"
    assert (ended.code, ended.err) == (2, said)
    assert (tmp_path / "tr ain.pt").read_bytes() == b"weights"


def test_training_without_settings_needs_a_checkpoint(dpm: Any, tmp_path: Path) -> None:
    ended = dpm("train", "-o", "model.pt", "--resume")
    assert ended.code == 2
    assert "no settings are given" in ended.err
    (tmp_path / "model.checkpoint.pt").write_bytes(b"something else")
    ended = dpm("train", "-o", "model.pt", "--resume")
    assert (ended.code, len(ended.err.splitlines())) == (1, 1)
    assert "model.checkpoint.pt" in ended.err

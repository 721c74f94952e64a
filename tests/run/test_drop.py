"""`target: {drop: …}`: as small as it gets for so many points of accuracy."""

from pathlib import Path

import pytest
import torch
from digits_recipe import recipe

import dpm_cli
from dpm_cli.events import Event, RoundStarted, WentBack
from dpm_cli.models import build

pytestmark = pytest.mark.slow  # trains


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "digits.pt"
    dpm_cli.train(recipe(data={"limit": None}, dense={"epochs": 4, "lr": 0.1}), output=path)
    return path


def test_rounds_go_on_until_the_floor_breaks(trained: Path, tmp_path: Path) -> None:
    settings = recipe(
        data={"limit": None},
        prune={"target": {"drop": 3.0}, "rounds": 8, "round_to": 1, "min_keep": 0.0, "end": 0.9},
        decay={"steps": 1},
        train={"epochs": 2, "lr": 1e-4},  # too little to win back what the last rounds cost
        finetune={"epochs": 1, "lr": 1e-4},
    )
    seen: list[Event] = []
    report = dpm_cli.prune(trained, settings, output=tmp_path / "out", on_event=seen.append)
    assert report.floor is not None
    assert report.validation_accuracy is not None
    assert report.validation_accuracy >= report.floor.dense - 3.0
    rounds = [event for event in seen if isinstance(event, RoundStarted)]
    (back,) = [event for event in seen if isinstance(event, WentBack)]
    assert back.validation_accuracy is not None
    assert back.validation_accuracy < report.floor.limit  # one round further was not within the floor
    assert report.target.reached == back.macs < report.dense.macs
    assert report.target.reached > rounds[-1].predicted_macs
    assert (report.target.kind, report.target.asked, report.target.is_met) == ("drop", 3.0, True)
    assert not report.floor.is_broken  # the floor is the target, so the run succeeds


def test_a_floor_that_never_breaks_gives_the_smallest_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = recipe(prune={"target": {"drop": 100.0}, "rounds": 2, "min_keep": 0.25, "end": 0.9})
    report = dpm_cli.prune(build("digits", classes=10, shape=(1, 8, 8)), settings, output=tmp_path / "out")
    assert [width.after for width in report.widths if width.layer == "block1.conv1"] == [8]
    assert report.floor is not None
    assert report.floor.text is None


def test_several_targets_all_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = recipe(prune={"target": {"macs": 0.6, "size": "80KB"}})
    report = dpm_cli.prune(build("digits", classes=10, shape=(1, 8, 8)), settings, output=tmp_path / "out")
    assert {each.kind: each.is_met for each in report.targets} == {"macs": True, "size": True}
    assert report.slim.macs <= 0.6 * report.dense.macs
    assert 4 * report.slim.params <= 80_000
    assert report.target in report.targets

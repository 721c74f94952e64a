"""`target: {drop: …}`: as small as it gets for so many points of accuracy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from digits_recipe import recipe

import dpm_cli
from dpm_cli.errors import AccuracyError, DpmError
from dpm_cli.events import EpochEnded, Event, Note, RoundStarted, WentBack
from dpm_cli.models import build
from dpm_cli.run.accuracy_floor import AccuracyFloor

pytestmark = pytest.mark.thorough  # trains


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


@pytest.fixture
def _breaks_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let accuracy fall below the floor after round 1 until the next was left out, and after round 4 for good."""

    def validate(self: AccuracyFloor) -> float:
        pruning = self.subject.pruning
        return 80.0 if (pruning.round, pruning.skipped) == (1, 0) or pruning.round == 4 else 90.0

    monkeypatch.setattr(AccuracyFloor, "_validate", validate)


WAITING: dict[str, Any] = {
    "prune": {"target": {"drop": 1.0}, "rounds": 4, "round_to": 1, "min_keep": 0.25, "end": 0.9},
    "decay": {"steps": 2},
    "train": {"epochs": 3},
    "checkpoint": {"every": 1},
}


@pytest.mark.usefixtures("_breaks_twice")
def test_a_round_waits_while_the_floor_is_broken_and_its_share_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    seen: list[Event] = []
    report = dpm_cli.prune(
        build("digits", classes=10, shape=(1, 8, 8)), recipe(**WAITING), output=tmp_path, on_event=seen.append
    )
    notes = [event.text for event in seen if isinstance(event, Note) and "waits" in event.text]
    rounds = [event for event in seen if isinstance(event, RoundStarted)]
    (back,) = [event for event in seen if isinstance(event, WentBack)]
    assert [event.round for event in rounds] == [1, 2, 3, 4]
    assert notes == [f"round 2 waits at step {rounds[1].step // 2}: validation 80.00 %, floor 89.00 %"]
    assert rounds[2].predicted_macs < rounds[1].predicted_macs < rounds[0].predicted_macs
    assert report.slim.macs == rounds[2].predicted_macs
    assert rounds[3].step == max(event.step for event in seen if isinstance(event, EpochEnded))  # after all training
    assert (back.culprit, back.validation_accuracy, back.macs) == ("round 4", 80.0, report.slim.macs)


@pytest.mark.usefixtures("_breaks_twice")
def test_a_run_that_waits_goes_on_after_an_interruption(tmp_path: Path) -> None:
    def go(output: Path, *, stop: bool = False, resume: bool = False) -> None:
        torch.manual_seed(0)

        def watch(event: Event) -> None:
            if stop and isinstance(event, RoundStarted) and event.round == 2:
                raise KeyboardInterrupt

        model = build("digits", classes=10, shape=(1, 8, 8))
        dpm_cli.prune(model, recipe(**WAITING), output=output, on_event=watch, resume=resume)

    go(tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, DpmError)):
        go(tmp_path / "parts", stop=True)
    go(tmp_path / "parts", resume=True)
    whole, parts = (torch.load(tmp_path / name / "slim.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    assert all(torch.equal(tensor, parts["state_dict"][name]) for name, tensor in whole["state_dict"].items())


def test_rounds_whose_share_is_gone_already_stop_no_further_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Widths in steps of 8 are so coarse that some of the rounds that are made up for choose nothing."""

    def validate(self: AccuracyFloor) -> float:
        pruning = self.subject.pruning
        return 80.0 if pruning.round and pruning.skipped < 10 else 90.0

    monkeypatch.setattr(AccuracyFloor, "_validate", validate)
    torch.manual_seed(0)
    settings = recipe(
        **WAITING
        | {"prune": WAITING["prune"] | {"rounds": 12, "round_to": 8}, "decay": {"steps": 1}, "train": {"epochs": 5}}
    )
    report = dpm_cli.prune(build("digits", classes=10, shape=(1, 8, 8)), settings, output=tmp_path)
    assert [width.after for width in report.widths if width.layer == "block1.conv1"] == [8]


def test_a_drop_that_allows_no_removal_ends_as_a_broken_floor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(AccuracyFloor, "_validate", lambda self: 80.0 if self.subject.pruning.round else 90.0)
    with pytest.raises(AccuracyError, match=r"\(1 point below .*; nothing could be removed: raise") as caught:
        dpm_cli.prune(build("digits", classes=10, shape=(1, 8, 8)), recipe(**WAITING), output=tmp_path)
    assert not caught.value.report.target.is_met


def test_without_training_the_floor_is_looked_at_after_every_round(trained: Path, tmp_path: Path) -> None:
    settings = recipe(
        data={"limit": None},
        prune={"target": {"drop": 3.0}, "rounds": "auto", "round_to": 1},
        decay={"steps": "auto"},
        train={"epochs": 0},
    )
    report = dpm_cli.prune(trained, settings, output=tmp_path)
    assert report.floor is not None
    assert report.validation_accuracy is not None
    assert report.validation_accuracy >= report.floor.limit
    assert report.slim.macs < report.dense.macs


def test_several_targets_all_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = recipe(prune={"target": {"macs": 0.6, "size": "80KB"}})
    report = dpm_cli.prune(build("digits", classes=10, shape=(1, 8, 8)), settings, output=tmp_path / "out")
    assert {each.kind: each.is_met for each in report.targets} == {"macs": True, "size": True}
    assert report.slim.macs <= 0.6 * report.dense.macs
    assert 4 * report.slim.params <= 80_000
    assert report.target in report.targets

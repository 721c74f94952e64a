"""No training step waits for the device: only rounds, looks at units, epochs and checkpoints read what it computed."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_recipe import recipe
from engine.waits import Waits
from torch import Tensor

import dpm_cli
from dpm_cli.events import Event, StageBegan, StepTaken
from dpm_cli.models import build

CASES: dict[str, dict[str, Any]] = {
    "depgraph": {"decay": {"steps": 6, "rectify": {"rate": 2.0, "criterion": "significance"}}},
    "depgraph, sparse": {"prune": {"sparse_epochs": 1}},
    "depgraph, fisher": {"prune": {"importance": "fisher", "observe_batches": 3}},
    "cosine": {"decay": {"steps": 6, "rectify": {"rate": 0.2, "criterion": "cosine"}}},
    "gate-decorator": {"prune": {"base": "gate-decorator", "rounds": 2}, "train": {"epochs": 6}},
    "clipped and mixed": {"train": {"epochs": 4, "clip_grad": 1.0, "mixup": 0.2, "label_smoothing": 0.1}},
}


def waits_of_steps(changes: dict[str, Any], folder: Path) -> tuple[list[list[str]], int]:
    """Prune in many small steps; return the waits of each step during which nothing else happened.

    Also returns how many of these steps had units that decayed.
    """
    steps: list[list[str]] = []
    others = ["start"]
    in_round = decayed = 0

    def listen(event: Event) -> None:
        nonlocal in_round, decayed
        found = waits.take()
        in_round += {"round": 1, "compact": -1}.get(event.kind, 0)
        if isinstance(event, StageBegan):
            watching.close()
            watching.enter_context(waits)  # not before: analysing a model takes thousands of calls
        if not isinstance(event, StepTaken):
            others.append(event.kind)
            return
        if not others:
            steps.append(found)
            decayed += in_round > 0
        others.clear()

    settings = recipe(**{"train": {"epochs": 4}, "decay": {"steps": 6}} | changes)
    settings["data"] = {"name": "digits", "batch": 8, "limit": 128, "augment": {"crop": 1, "flip": True, "cutout": 2}}
    torch.manual_seed(0)
    waits = Waits()
    with ExitStack() as watching:
        dpm_cli.prune(build("digits", classes=10, shape=(1, 8, 8)), settings, output=folder, on_event=listen)
    return steps, decayed


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_steps_of_a_run_do_not_wait(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpm_cli.run.lives.LOOKS", 1)  # 20 in a decay as short as here would be one in every step
    steps, decayed = waits_of_steps(CASES[case], tmp_path)
    assert len(steps) > 15
    assert decayed >= 3
    assert [found for found in steps if found] == []


@pytest.mark.thorough
def test_choosing_again_waits_once_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpm_cli.run.lives.LOOKS", 1)
    again = {"prune": {"rounds": 2}, "decay": {"steps": 6, "rectify": {"criterion": "reselect"}}}
    steps, _ = waits_of_steps(again, tmp_path)
    assert len([found for found in steps if found]) == 2


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool(tensor.sum() > 0),
        lambda tensor: float(tensor.sum()),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.cpu(),
        lambda tensor: torch.tensor([1.0, 2.0]),
        lambda tensor: tensor.tolist(),
    ],
    ids=["item", "if", "float", "mask", "cpu", "upload", "tolist"],
)
def test_counter_sees_each_kind_of_wait(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.waits.PACKAGE", "run")  # this file counts as ours
    with Waits() as waits:
        tensor: Tensor = torch.ones(3) * 2
        assert waits.take() == []
        read(tensor)
    assert len(waits.take()) == 1

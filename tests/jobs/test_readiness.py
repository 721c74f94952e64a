"""`dpm inspect` finds what would keep `dpm prune` from beginning, and nothing else."""

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from digits_recipe import recipe
from torch import nn

import dpm_cli
from dpm_cli.cli.app import main
from dpm_cli.errors import DpmError, OutputError
from dpm_cli.events import StageBegan
from dpm_cli.models import build

PROBLEMS = {
    "schedule": ({"decay": {"steps": 500}}, 2, "do not fit between prune.start and prune.end"),
    "data": ({"data": {"name": "folder", "root": "nowhere"}}, 2, "data.root nowhere is not a folder"),
    "size": ({"data": {"memory_limit": 100}}, 2, "digits at 1x8x8 takes"),
    "validation": ({"data": {"validation": 0.999}}, 2, "leaves none of 128 training images"),
}


class Began(Exception):
    """A run has begun to train."""


@pytest.fixture(scope="module")
def dense() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("digits", classes=10, shape=(1, 8, 8)).eval()


def begins(model: torch.nn.Module, values: dict[str, Any], folder: Path) -> str | None:
    """Why a run does not begin to train; None if it does."""

    def watch(event: object) -> None:
        if isinstance(event, StageBegan):
            raise Began

    try:
        dpm_cli.prune(model, values, output=folder, on_event=watch)
    except Began:
        return None
    except DpmError as error:
        return str(error)
    raise AssertionError("a run ended without training")


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.thorough
def test_what_stops_a_run_is_found_and_said_in_the_same_words(
    dense: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    changes, code, message = PROBLEMS[name]
    plan = dpm_cli.inspect(dense, recipe(**changes))
    assert (plan.run, plan.exit_code) == (None, code)
    assert message in plan.problems[0]
    assert plan.problems[0] == begins(dense, recipe(**changes), tmp_path / "out")
    assert plan.to_dict()["problems"] == list(plan.problems)


def test_a_precision_that_the_device_lacks_is_one_of_the_problems(
    dense: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpm_cli.jobs.readiness.require_space", refuse_space)
    plan = dpm_cli.inspect(dense, recipe(precision="fp16"), device="cpu")
    assert [problem.partition(",")[0] for problem in plan.problems] == ["no room", "precision is 'fp16'"]


def refuse_space(folder: Path, count: int) -> None:
    raise OutputError("no room")


@pytest.mark.thorough
def test_what_is_called_possible_begins(dense: torch.nn.Module, tmp_path: Path) -> None:
    plan = dpm_cli.inspect(dense, recipe())
    assert (plan.problems, plan.exit_code) == ((), 0)
    assert plan.run
    assert (plan.run.train + plan.run.validation, plan.run.test) == (128, 355)
    assert (plan.run.rounds, plan.run.decay_steps) == (1, 2)
    assert begins(dense, recipe(), tmp_path / "out") is None


def test_all_problems_are_told_not_only_the_first(
    dense: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 1000))  # type: ignore[attr-defined]
    torch.save(dense.state_dict(), "model.pt")
    assert main(["inspect", "model.pt", "-r", "digits", "--set", "data.validation=0.9999"]) == 2
    ended = capsys.readouterr()
    assert "groups of tied layers" in ended.out  # the plan is shown all the same
    disk, data = ended.err.splitlines()
    assert disk.startswith("error: the disk of out has 0 MB free, and the run may need")
    assert "leaves none of" in data


def test_a_run_needs_room_on_its_disk(dense: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 1000))  # type: ignore[attr-defined]
    message = begins(dense, recipe(), tmp_path / "out" / "below")
    assert message
    assert message.endswith("free some, or choose another --output")


def test_inspect_shows_images_and_schedule(
    dense: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(dense.state_dict(), "model.pt")
    assert main(["inspect", "model.pt", "-r", "digits"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1298 images to train on, 144 for validation, 355 to test on; 20 steps an epoch; 3 rounds, units" in out


class Windows(nn.Module):
    """Puts windows together again as Swin's published code does: a batch that was divided is no batch of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu().permute(0, 2, 3, 1)
        windows = x.reshape(-1, 2, 4, 2, 4, 16).transpose(2, 3).reshape(-1, 4, 4, 16)
        batch = int(windows.shape[0] / (8 * 8 / 4 / 4))
        x = windows.view(batch, 2, 2, 4, 4, -1).transpose(2, 3).reshape(batch, 8, 8, -1).permute(0, 3, 1, 2)
        return cast(torch.Tensor, self.head(self.last(x).relu().mean((2, 3))))


def test_a_model_of_ones_own_that_no_file_can_hold_is_refused_before_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = recipe(prune={"target": {"macs": 0.7}, "round_to": 1}, export=["torchscript", "onnx-int8"])
    said = begins(Windows().eval(), values, tmp_path / "out")
    assert said is not None
    assert said.startswith("tried before training, the model cannot be exported: model.ts was not written:")
    assert said.endswith("or prune without files: --set export=[]")
    assert not (tmp_path / "out").exists()
    assert said in dpm_cli.inspect(Windows().eval(), values).problems
    assert begins(Windows().eval(), {**values, "export": []}, tmp_path / "out") is None


class WritesOver(nn.Module):
    """Writes over what the backward pass of a rectifier reads, as a `+=` on its output does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 16, 3), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x += 1
        return cast(torch.Tensor, self.head(x.mean((2, 3))))


def test_a_model_of_ones_own_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    values = recipe(prune={"target": {"macs": 0.7}, "round_to": 1})
    said = begins(WritesOver().eval(), values, tmp_path / "out")
    assert said is not None
    assert said.startswith("the model cannot be trained: RuntimeError: one of the variables needed for gradient")
    assert said in dpm_cli.inspect(WritesOver().eval(), values).problems


def test_dense_training_refuses_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    values = recipe(model={"arch": "test_readiness:WritesOver", "classes": 10, "input": [1, 8, 8]})
    with pytest.raises(DpmError, match="the model cannot be trained: RuntimeError"):
        dpm_cli.train(values, output=tmp_path / "model.pt", trust=True)
    assert not (tmp_path / "model.pt").exists()

"""Whole runs on a GPU: these only run where there is one."""

import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from digits_recipe import recipe

import dpm_cli
from dpm_cli.events import Event, StageBegan, StepTaken
from dpm_cli.models import build

pytestmark = pytest.mark.gpu


def make_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("digits", classes=10, shape=(1, 8, 8))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_run_reaches_its_target_in_every_precision(tmp_path: Path, precision: str) -> None:
    settings = recipe(precision=precision, train={"epochs": 4})
    report = dpm_cli.prune(make_net(), settings, output=tmp_path, device="cuda")
    assert report.slim.macs <= 0.5 * report.dense.macs


@pytest.mark.parametrize("compile", ["auto", "off"])
def test_deterministic_runs_give_the_same_bits(tmp_path: Path, compile: str) -> None:
    engine = {"deterministic": True, "compile": compile}
    settings = recipe(engine=engine, decay={"steps": 2, "rectify": {}}, train={"epochs": 4})
    weights = []
    for name in ("one", "two"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operators without a deterministic implementation
            dpm_cli.prune(make_net(), settings, output=tmp_path / name, device="cuda")
        weights.append(dpm_cli.load(tmp_path / name / "slim.pt").state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_no_step_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpm_cli.run.lives.LOOKS", 1)
    steps: list[list[str]] = []
    others = ["start"]
    with ExitStack() as watching, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")

        def listen(event: Event) -> None:
            found = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
            seen.clear()
            if isinstance(event, StageBegan):
                torch.cuda.set_sync_debug_mode("warn")
                watching.callback(torch.cuda.set_sync_debug_mode, "default")
            if not isinstance(event, StepTaken):
                others.append(event.kind)
                return
            if not others:
                steps.append(found)
            others.clear()

        settings = recipe(data={"batch": 8}, train={"epochs": 4}, decay={"steps": 6, "rectify": {}})
        dpm_cli.prune(make_net(), settings, output=tmp_path, device="cuda", on_event=listen)
    assert len(steps) > 15
    assert [found for found in steps if found] == []


def test_one_process_of_a_launcher_trains_with_nccl(tmp_path: Path) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=1",
        "--master-port=29573",
        "-m",
        "dpm_cli",
    ]
    small = ["--set", "data.limit=200", "--set", "train.epochs=2", "--device", "cuda", "--quiet"]
    command = [*launcher, "train", "-r", "digits", "-o", str(tmp_path / "model.pt"), *small]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "model.pt").exists()

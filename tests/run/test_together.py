"""Whole runs in several real processes: the same decisions as one process, and what happens when one of them fails."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from dpm_cli import load
from dpm_cli.engine.checkpoint import load_checkpoint
from dpm_cli.files import CHECKPOINT
from dpm_cli.models import build

pytestmark = pytest.mark.slow

RECIPE = """
model: {arch: digits, classes: 10, input: [1, 8, 8]}
data: {name: digits, batch: 33, limit: 300, augment: {crop: 1, flip: false}}
prune: {target: {macs: 0.5}, rounds: 2, round_to: 4}
decay: {steps: 4, rectify: {start: 0.5}}
train: {epochs: 3, mixup: 0.2}
finetune: {epochs: 1, lr: 0.02}
export: []
precision: fp32
checkpoint: {every: 5}
"""

# What `python -m dpm_cli` does; in one of the processes, `sys.argv[1]` may happen at a step or before the start.
RUN = """
import os, signal, sys, torch
from dpm_cli.cli.app import main
from dpm_cli.cli import prune
from dpm_cli.engine.learner import Learner

torch.set_num_threads(1)
what, who, when = sys.argv[1].split(":")
take_step, taken = Learner.step_, iter(range(10**9))

def step_(learner, *arguments, **settings):
    loss = take_step(learner, *arguments, **settings)
    if next(taken) == int(when):
        match what:
            case "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "spoil":
                learner.model.state_dict()["conv1.weight"][0] += 1e-6
            case "run out of memory":
                raise torch.OutOfMemoryError("out of memory")
    return loss

arguments = sys.argv[2:]
if os.environ.get("RANK", "0") == who:
    Learner.step_ = step_
    if what == "set":
        arguments += ["--set", when]
sys.exit(main(["prune", *arguments]))
"""
NOTHING = "nothing:0:0"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The arguments of a run: a trained model and a recipe."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = build("digits", classes=10, shape=(1, 8, 8))
    model(torch.randn(64, 1, 8, 8))
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "model.pt", "--recipe", folder / "recipe.yaml", "--output"


def run_alone(files, folder, *more):
    command = [sys.executable, "-c", RUN, NOTHING, *map(str, (*files, folder, *more))]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run_alone(files, folder)
    return folder


def decisions(folder):
    """All that rounds chose, released and removed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key != "difference"}
        for line in lines
        if line["event"] in ("round", "compact")
    ]


def assert_same_victims(left, right):
    """Also which units: those of others would have other weights."""
    assert decisions(left) == decisions(right) != []
    # Not the running statistics, which make much of a rounding error.
    weights = [dict(load(folder / "slim.pt").named_parameters()) for folder in (left, right)]
    torch.testing.assert_close(*weights, rtol=0.02, atol=0.02)
    assert np.ptp(weights[0]["conv1.weight"].detach().numpy()) > 0.4  # far more than the tolerance


def codes(ended):
    return [code for code, _, _ in ended]


def assert_told_once(ended, code, text):
    """One line in all, and the same exit code everywhere."""
    assert codes(ended) == [code] * len(ended), ended
    errors = [line for _, _, said in ended for line in said.splitlines() if "error" in line]
    assert len(errors) == 1, ended
    assert text in errors[0]
    assert not any("Traceback" in said for _, _, said in ended)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_choose_the_victims_of_one(together, files, alone, tmp_path, size):
    ended = together(RUN, NOTHING, *files, tmp_path, "--json", size=size)
    assert codes(ended) == [0] * size, ended
    assert_same_victims(tmp_path, alone)
    assert json.loads(ended[0][1]) == json.loads((tmp_path / "report.json").read_text())
    assert [said for _, *said in ended[1:]] == [["", ""]] * (size - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl", "recipe.yaml", "report.json", "slim.pt",
    ]  # fmt: skip


@pytest.mark.parametrize("base", ["otov2", "gate-decorator"])
def test_every_base_pruner_decides_alike(together, files, tmp_path, base):
    change, folders = ["--set", f"prune.base={base}"], [tmp_path / "alone", tmp_path / "together"]
    run_alone(files, folders[0], *change)
    assert codes(together(RUN, NOTHING, *files, folders[1], *change)) == [0, 0]
    assert_same_victims(*folders)


@pytest.mark.parametrize("who", [0, 1])
def test_signal_to_one_process_stops_all_and_any_number_resumes(together, files, alone, tmp_path, who):
    ended = together(RUN, f"signal:{who}:6", *files, tmp_path)
    assert_told_once(ended, 143, "stopped in stage train at step 7; continue with --resume")
    assert load_checkpoint(tmp_path / CHECKPOINT).state["step"] == 7
    if who:
        run_alone(files, tmp_path, "--resume")
    else:
        assert codes(together(RUN, NOTHING, *files, tmp_path, "--resume", size=3)) == [0] * 3
    assert_same_victims(tmp_path, alone)


def test_resumed_processes_end_with_the_bits_of_uninterrupted_ones(together, files, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert codes(together(RUN, NOTHING, *files, whole)) == [0, 0]
    assert codes(together(RUN, "signal:1:9", *files, stopped)) == [143, 143]
    assert codes(together(RUN, NOTHING, *files, stopped, "--resume")) == [0, 0]
    weights = [load(folder / "slim.pt").state_dict() for folder in (whole, stopped)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("happening", "code", "text"),
    [
        ("run out of memory:1:6", 1, "out of memory with data.batch 33: try --set data.batch=16"),
        ("run out of memory:0:6", 1, "out of memory with data.batch 33: try --set data.batch=16"),
        ("spoil:1:6", 1, "the processes disagree on the model after step 8 (rank 1 and rank 0)"),
        ("set:1:seed=1", 1, "the processes disagree on the recipe, the model file or the data"),
        ("set:1:train.lr=-1", 2, "train.lr"),
        ("set:0:prune.target.macs=0.0001", 3, "cannot be met"),
    ],
)
def test_one_process_that_fails_ends_all_with_its_error(together, files, tmp_path, happening, code, text):
    assert_told_once(together(RUN, happening, *files, tmp_path), code, text)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("who", [0, 1])
def test_killed_process_ends_the_others_and_the_run_goes_on_later(together, files, alone, tmp_path, who):
    ended = together(RUN, f"kill:{who}:8", *files, tmp_path)
    assert ended[who][0] == -9
    assert ended[1 - who][0] == 1
    assert "error: another process of this run was lost; --resume goes on" in ended[1 - who][2]
    run_alone(files, tmp_path, "--resume")
    assert_same_victims(tmp_path, alone)


def test_batch_that_is_too_small_for_its_processes_is_refused(together, files, tmp_path):
    ended = together(RUN, NOTHING, *files, tmp_path, "--set", "data.batch=2", "--set", "decay.steps=1", size=3)
    assert_told_once(ended, 2, "data.batch is 2, less than an image for each of 3 processes")


def test_means_are_folded_as_by_one_process(together, files, tmp_path):
    untrained = ("--set", "train.epochs=0", "--set", "finetune.epochs=0")
    run_alone(files, tmp_path / "alone", *untrained)
    ended = together(RUN, NOTHING, *files, tmp_path / "two", *untrained)
    assert codes(ended) == [0, 0], ended
    assert_same_victims(tmp_path / "two", tmp_path / "alone")


def test_finished_run_prints_its_report_again(together, files, alone):
    ended = together(RUN, NOTHING, *files, alone, "--resume", "--json")
    assert codes(ended) == [0, 0]
    assert json.loads(ended[0][1]) == json.loads((alone / "report.json").read_text())
    assert ended[1][1] == ""


def test_launcher_itself(files, alone, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dpm_cli"]
    command += ["prune", *map(str, (*files, tmp_path, "--device", "cpu", "--json"))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(ended.stdout) == json.loads((tmp_path / "report.json").read_text())
    assert_same_victims(tmp_path, alone)
    failed = subprocess.run([*command, "--overwrite", "--set", "train.lr=-1"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert len([line for line in failed.stderr.splitlines() if "train.lr" in line and "error:" in line]) == 1
    assert "exitcode  : 2" in failed.stderr


@pytest.mark.parametrize("who", [0, 1])
def test_killed_process_is_told_before_the_launchers_signal_ends_the_other(files, tmp_path, who):
    """SIGTERM comes a tenth of a second after the kill, and the line some seconds later."""
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += map(str, (tmp_path / "run.py", f"kill:{who}:8", *files, tmp_path / "out", "--device", "cpu"))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "error: another process of this run was lost; --resume goes on" in ended.stderr

import copy
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from digits_recipe import recipe
from killed import start_killed
from PIL import Image
from torch import nn

import dpm_cli
from dpm_cli.errors import (
    AccuracyError,
    DpmError,
    Interrupted,
    ModelFileError,
    OutputError,
    RecipeError,
    TargetError,
    UsageError,
)
from dpm_cli.export import open_exported
from dpm_cli.measure import count_parameters, measure_in_turns, measure_latency
from dpm_cli.models import build, load, load_slim
from dpm_cli.recipe import hash_recipe, load_recipe, parse_recipe
from dpm_cli.recipe.sections import Prune
from dpm_cli.report import Report, TargetReport


@pytest.fixture(autouse=True)
def _short_latencies(monkeypatch):
    monkeypatch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))
    monkeypatch.setattr("dpm_cli.jobs.prune.write_page", lambda folder: None)  # tests/display draws it
    monkeypatch.setattr("dpm_cli.jobs.evaluate.measure_latency", partial(measure_latency, seconds=0.002))


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    module = build("digits", classes=10, shape=(1, 8, 8))
    module(torch.randn(64, 1, 8, 8))  # moves the running statistics
    return module.eval()


@pytest.fixture(scope="module")
def dense_file(dense, tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "model.pt"
    torch.save(dense.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def finished(dense_file, tmp_path_factory):
    """The folder of a finished run, and its report."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))
        patch.setattr("dpm_cli.jobs.prune.write_page", lambda folder: None)  # tests/display draws it
        report = dpm_cli.prune(dense_file, recipe(export=["torchscript"]), output=folder)
    return folder, report


IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# ------------------------------------------------------------------------------------------------------------- prune


def test_report_and_files_of_a_run_agree(finished, dense):
    folder, report = finished
    slim = load(folder / "slim.pt")
    assert report.arch == "digits"
    assert report.target.is_met
    assert report.slim.params == sum(parameter.numel() for parameter in slim.parameters())
    assert report.dense.params == count_parameters(dense)
    assert report.widths
    for width in report.widths:
        assert (dense.get_submodule(width.layer).weight.shape[0], slim.get_submodule(width.layer).weight.shape[0]) == (
            width.before,
            width.after,
        )
        assert width.after % 4 == 0
    assert dpm_cli.Report.from_json((folder / "report.json").read_text()) == report
    assert {name: str(folder / file) for name, file in FILES.items()} == report.files
    (made,) = report.exports
    assert made.path == str(folder / "model.ts")
    with torch.no_grad():
        torch.testing.assert_close(open_exported(made.path)(IMAGES), slim(IMAGES))
    assert hash_recipe(load_recipe(folder / "recipe.yaml")) == hash_recipe(parse_recipe(recipe(export=["torchscript"])))


FILES = {"slim": "slim.pt", "report": "report.json", "recipe": "recipe.yaml", "metrics": "metrics.jsonl"}


@pytest.mark.thorough
def test_events_are_told_in_order(dense_file, tmp_path):
    told = []
    dpm_cli.prune(dense_file, recipe(), output=tmp_path, on_event=lambda event: told.append(event.kind))
    told = [kind for kind in told if kind != "phase"]
    assert told[0] == "start"
    assert told[-1] == "done"
    assert told.count("step") == 6
    assert told.count("epoch") == 2


@pytest.mark.thorough
def test_slim_file_gives_the_same_bits_in_a_fresh_process(finished, tmp_path):
    folder, _ = finished
    code = """
        import sys, torch, dpm_cli.models
        torch.set_num_threads(1)
        module = dpm_cli.models.load(sys.argv[1])
        images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.save((module.state_dict(), module(images)), sys.argv[2])
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), folder / "slim.pt", tmp_path / "seen.pt"], check=True, timeout=60
    )
    weights, outputs = torch.load(tmp_path / "seen.pt", weights_only=True)
    slim = load(folder / "slim.pt")
    assert_same_bits(slim.state_dict(), weights)
    with torch.no_grad():
        assert torch.equal(slim(IMAGES), outputs)


@pytest.mark.slow
def test_onnx_export_of_a_run_is_measured_beside_the_dense_model(dense_file, tmp_path):
    report = dpm_cli.prune(dense_file, recipe(export=["onnx"], train={"epochs": 1}), output=tmp_path)
    assert set(report.slim.latency) == set(report.dense.latency) == {"torch", "onnxruntime"}
    assert report.exports[0].max_difference <= 1e-4
    assert (tmp_path / "model.onnx").stat().st_size == report.exports[0].bytes
    with torch.no_grad():
        expected = load(tmp_path / "slim.pt")(IMAGES)
    torch.testing.assert_close(open_exported(tmp_path / "model.onnx")(IMAGES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_slim_model_can_be_pruned_again(finished, tmp_path):
    folder, first = finished
    again = dpm_cli.prune(folder / "slim.pt", recipe(prune={"target": {"macs": 0.6}}), output=tmp_path / "file")
    assert again.dense.params == first.slim.params
    assert again.slim.macs <= 0.6 * first.slim.macs
    assert again.arch == "digits"
    assert count_parameters(load(tmp_path / "file" / "slim.pt")) == again.slim.params

    module = load(folder / "slim.pt")
    from_object = dpm_cli.prune(module, recipe(prune={"target": {"macs": 0.6}}), output=tmp_path / "object")
    assert from_object.arch == "digits"
    assert_same_bits(
        load(tmp_path / "file" / "slim.pt").state_dict(), load(tmp_path / "object" / "slim.pt").state_dict()
    )


class OwnNet(nn.Module):
    """A class that no recipe can name."""

    def __init__(self, width=12):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))).mean((2, 3)))


class OwnNetOfOldHabits(OwnNet):
    """Joins whole maps with `view`, which works only while they are contiguous."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16 * 12, 10)

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.norm(self.first(x)))))
        return self.head(x.view(x.size(0), -1))


@pytest.mark.parametrize("own", [OwnNet, OwnNetOfOldHabits])
@pytest.mark.parametrize("arch", ["digits", "my own"])
def test_module_of_an_own_class_is_pruned_and_loads_into_a_fresh_one(tmp_path, arch, own):
    torch.manual_seed(0)
    model = own()
    before = copy.deepcopy(model.state_dict())
    settings = recipe(model={"arch": arch}, prune={"round_to": 1})
    report = dpm_cli.prune(model, settings, output=tmp_path)
    assert_same_bits(model.state_dict(), before)
    assert model.training
    assert report.arch is None
    assert any("dpm_cli.load(path, model=...)" in note for note in report.notes)
    with pytest.raises(ModelFileError, match="pass model="):
        load(tmp_path / "slim.pt")
    slim = load(tmp_path / "slim.pt", model=own())
    assert count_parameters(slim) == report.slim.params < count_parameters(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), "gives 5 logits, model.classes is 10"),
        (lambda: nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten()), r"does not run on images of \[1, 8, 8\]"),
        (lambda: nn.Conv2d(1, 10, 3), "logits of shape"),
        (lambda: poisoned(OwnNet()), "NaN or infinite"),
    ],
)
def test_module_that_does_not_fit_the_recipe_is_refused_in_one_line(tmp_path, model, message):
    with pytest.raises(UsageError, match=message) as refusal:
        dpm_cli.prune(model(), recipe(), output=tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def poisoned(model):
    model.head.weight.data[3, 2] = float("nan")
    return model


@pytest.mark.thorough
def test_denormals_are_flushed_during_a_run_only(dense_file, tmp_path):
    tiny, during = torch.tensor([1e-39]), []
    dpm_cli.prune(dense_file, recipe(), output=tmp_path, on_event=lambda event: during.append((tiny * 1).item()))
    assert set(during) == {0.0}
    assert (tiny * 1).item() > 0


def test_two_runs_give_the_same_bits(finished, dense_file, tmp_path):
    torch.manual_seed(12345)  # whatever the caller's dice say
    dpm_cli.prune(dense_file, recipe(export=["torchscript"]), output=tmp_path)
    assert_same_bits(load(tmp_path / "slim.pt").state_dict(), load(finished[0] / "slim.pt").state_dict())


# ----------------------------------------------------------------------------------------------- folders, resumption


def test_finished_run_resumed_returns_its_report(finished, dense_file):
    folder, report = finished
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert dpm_cli.prune(dense_file, recipe(export=["torchscript"]), output=folder, resume=True) == report
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(OutputError, match="finished run of another recipe"):
        dpm_cli.prune(dense_file, recipe(), output=folder, resume=True)
    with pytest.raises(OutputError, match="finished run"):
        dpm_cli.prune(dense_file, recipe(export=["torchscript"]), output=folder)


@pytest.mark.parametrize("target", [{"size": "1KB"}, {"macs": 2}])
def test_run_that_is_refused_before_training_leaves_no_new_folder(dense_file, tmp_path, target):
    with pytest.raises(TargetError):
        dpm_cli.prune(dense_file, recipe(prune={"target": target}), output=tmp_path / "new" / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["other weights", "damaged", "missing"])
def test_finished_run_is_not_resumed_from_another_model_file(finished, dense, dense_file, tmp_path, content):
    path = tmp_path / "model.pt"
    if content == "other weights":
        torch.save({name: tensor + 1 for name, tensor in dense.state_dict().items()}, path)
    if content == "damaged":
        path.write_bytes(dense_file.read_bytes()[:1000])
    message = r"report\.json was made from another model file" if content == "other weights" else r"model\.pt"
    with pytest.raises(DpmError, match=message):
        dpm_cli.prune(path, recipe(export=["torchscript"]), output=finished[0], resume=True)


def test_finished_run_of_an_older_version_returns_its_report(finished, dense_file, tmp_path):
    folder, report = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    values = json.loads((folder / "report.json").read_text())
    del values["origin"]
    (tmp_path / "report.json").write_text(json.dumps(values, indent=2))
    resumed = dpm_cli.prune(dense_file, recipe(export=["torchscript"]), output=tmp_path, resume=True)
    assert resumed == replace(report, origin=None)


@pytest.mark.thorough
def test_finished_run_that_broke_its_floor_fails_the_same_way_when_resumed(dense_file, tmp_path, monkeypatch):
    accuracies = itertools.chain([90.0], itertools.repeat(0.0))  # the dense model is measured first
    monkeypatch.setattr("dpm_cli.engine.setup.Setup.validate", lambda setup, model: next(accuracies))
    settings, said = recipe(prune={"max_drop": 1}), []
    for attempt in range(2):
        with pytest.raises(AccuracyError, match="round 1 broke the accuracy floor") as broken:
            dpm_cli.prune(dense_file, settings, output=tmp_path, resume=attempt == 1)
        said.append((str(broken.value), broken.value.report))
    assert said[0] == said[1]
    assert broken.value.exit_code == 4
    assert count_parameters(load(tmp_path / "slim.pt")) == said[0][1].dense.params


@pytest.mark.parametrize(
    ("missed", "text"),
    [
        (TargetReport("macs", 0.5, 1_000_000, 2_000_000, 1_500_000), "macs ≤ 1.00 M is not met, {}: 1.50 M is left"),
        (
            TargetReport("drop", 1.0, 2_000_000, 2_000_000, 2_000_000),
            "drop 1 point is not met, {}: nothing could be removed",
        ),
    ],
    ids=["macs", "drop"],
)
def test_run_that_missed_its_target_delivers_and_fails_the_same_way_when_resumed(
    missed, text, dense_file, tmp_path, monkeypatch
):
    pages = []
    monkeypatch.setattr("dpm_cli.run.outcome._compare_with_target", lambda subject: [missed])
    monkeypatch.setattr("dpm_cli.jobs.prune.write_page", pages.append)
    for resume in (False, True):
        with pytest.raises(TargetError) as error:
            dpm_cli.prune(dense_file, recipe(), output=tmp_path, resume=resume)
        assert error.value.report.target == missed
        assert str(error.value) == (
            f"target {text.format('because layers had to stay whole')}; the files hold that model"
        )
    assert pages == [tmp_path]


def test_report_that_is_none_is_refused(dense_file, tmp_path):
    (tmp_path / "report.json").write_text('{\n  "arch": 3}')
    with pytest.raises(OutputError, match="is not a report"):
        dpm_cli.prune(dense_file, recipe(), output=tmp_path, resume=True)


def interrupt(dense_file, folder, after, **settings):
    steps = iter(range(1, 100))
    with pytest.raises(Interrupted):
        dpm_cli.prune(dense_file, recipe(), output=folder, should_stop=lambda: next(steps) == after, **settings)


@pytest.mark.thorough
def test_unfinished_run_is_resumed_or_replaced_but_never_by_accident(dense_file, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "out"
    dpm_cli.prune(dense_file, recipe(), output=whole)
    interrupt(dense_file, folder, 3)
    with pytest.raises(OutputError, match="--resume continues it, --overwrite starts anew"):
        dpm_cli.prune(dense_file, recipe(), output=folder)
    events = []
    dpm_cli.prune(dense_file, recipe(), output=folder, resume=True, on_event=events.append)
    assert [event.step for event in events if event.kind == "resumed"] == [3]
    assert_same_bits(load(folder / "slim.pt").state_dict(), load(whole / "slim.pt").state_dict())


@pytest.mark.thorough
def test_run_killed_between_the_two_renames_of_a_checkpoint_is_unfinished(dense_file, tmp_path):
    interrupt(dense_file, tmp_path, 2)
    (tmp_path / "checkpoint.pt").rename(tmp_path / "checkpoint.previous.pt")
    with pytest.raises(OutputError, match="unfinished run"):
        dpm_cli.prune(dense_file, recipe(), output=tmp_path)
    (tmp_path / "report.json").touch()  # of a run before, which --overwrite began to replace
    events = []
    dpm_cli.prune(dense_file, recipe(), output=tmp_path, resume=True, on_event=events.append)
    assert [event.step for event in events if event.kind == "resumed"] == [2]
    assert not list(tmp_path.glob("checkpoint*"))


@pytest.mark.thorough
def test_overwriting_removes_both_checkpoints_and_what_a_kill_left_behind(dense_file, tmp_path):
    interrupt(dense_file, tmp_path, 2)
    interrupt(dense_file, tmp_path, 1, resume=True)
    assert len(list(tmp_path.glob("checkpoint*"))) == 2
    leftovers = [".checkpoint-0123abcd.pt", ".model-00000000.onnx", ".report-ffffffff.json"]
    foreign = [".checkpoint-mine.pt", ".other-0123abcd.pt"]
    for name in leftovers + foreign:
        (tmp_path / name).touch()
    seen = []
    dpm_cli.prune(
        dense_file,
        recipe(),
        output=tmp_path,
        overwrite=True,
        on_event=lambda event: event.kind == "start" and seen.append(sorted(path.name for path in tmp_path.iterdir())),
    )
    assert seen[0] == sorted([*foreign, ".dpm-lock", "metrics.jsonl", "recipe.yaml"])


@pytest.mark.parametrize("settings", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.thorough
def test_a_second_run_into_the_same_folder_is_refused_and_harms_nothing(finished, dense_file, tmp_path, settings):
    refusals = []

    def disturb(event):
        if event.kind == "step" and not refusals:
            with pytest.raises(OutputError, match=r"in use by process .*: wait until that run is over") as refusal:
                dpm_cli.prune(dense_file, recipe(), output=tmp_path, **settings)
            refusals.append(refusal)

    dpm_cli.prune(dense_file, recipe(), output=tmp_path, on_event=disturb)
    assert refusals
    assert_same_bits(load(tmp_path / "slim.pt").state_dict(), load(finished[0] / "slim.pt").state_dict())
    assert not (tmp_path / ".dpm-lock").exists()


def test_target_that_cannot_be_met_leaves_no_trace_and_takes_no_time(dense_file, tmp_path):
    with pytest.raises(TargetError, match="cannot be met: between"):
        dpm_cli.prune(dense_file, recipe(prune={"target": {"macs": 0.0001}}), output=tmp_path)
    assert not any(tmp_path.iterdir())


def planned_epochs(dense_file, folder, settings):
    """(stage, epoch) of a run, as it says at its start."""
    events = []
    with pytest.raises(Interrupted):
        dpm_cli.prune(dense_file, settings, output=folder, on_event=events.append, should_stop=lambda: True)
    (started,) = [event for event in events if event.kind == "start"]
    return [(stage.name, epoch) for stage in started.stages for epoch in range(1, stage.epochs + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("base", get_args(Prune.model_fields["base"].annotation))
def test_run_killed_at_twenty_random_moments_ends_with_the_same_bits(dense_file, tmp_path, base):
    """Between any two events, in the middle of a checkpoint, before it is flushed and before each of its renames."""
    own = {
        "gate-decorator": {"train": {"epochs": 10}, "prune": {"gates": {"tick_epochs": 5, "tick_lr": 0.01}}},
        "on-the-fly": {"train": {"epochs": 50}, "finetune": {"epochs": 0}, "prune": {"target": {"sparsity": 0.5}}},
    }.get(base, {})
    changes = {
        "train": {"epochs": 30}, "finetune": {"epochs": 20}, "checkpoint": {"every": 2}, "export": ["torchscript"],
        "decay": {"steps": 15, "rectify": {"criterion": "cosine", "rate": 0.0, "length": 0.8}},
    } | own  # fmt: skip
    settings = recipe(**changes | {"prune": {"rounds": 3, "base": base} | own.get("prune", {})})
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert start_killed("prune", dense_file, settings, output=whole) == 0
    dice = np.random.default_rng(0)
    moments = [*["event"] * 8, *["half"] * 4, *["rename"] * 4, *["flush"] * 4]
    dice.shuffle(moments)
    most = {"event": 40, "half": 150, "rename": 12, "flush": 12}  # so that twenty of them do not reach the end
    kills = []
    for moment in moments:
        number = int(dice.integers(2, most[moment]))
        code = start_killed("prune", dense_file, settings, output=folder, moment=moment, number=number)
        kills.append((moment, number, code))
    assert [code for *_, code in kills] == [-signal.SIGKILL] * 20, kills
    assert start_killed("prune", dense_file, settings, output=folder) == 0
    assert_same_bits(load(folder / "slim.pt").state_dict(), load(whole / "slim.pt").state_dict())
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".", "checkpoint"))]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [(line["stage"], line["epoch"]) for line in lines if line["event"] == "epoch"]
    assert epochs == planned_epochs(dense_file, tmp_path / "planned", settings)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["rename", "flush"])
def test_run_killed_while_it_writes_its_results_ends_with_the_same_bits(finished, dense_file, tmp_path, moment):
    settings = recipe(export=["torchscript"], checkpoint={"every": 100})
    folder, number = tmp_path / "out", 0
    while True:  # later and later: checkpoint, TorchScript, slim.pt, recipe, report
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        code = start_killed("prune", dense_file, settings, output=folder, moment=moment, number=number)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert start_killed("prune", dense_file, settings, output=folder) == 0
        assert not [path.name for path in folder.iterdir() if path.name.startswith((".", "checkpoint"))]
        assert_same_bits(load(folder / "slim.pt").state_dict(), load(finished[0] / "slim.pt").state_dict())
    assert number > 5


# -------------------------------------------------------------------------------------------- evaluate, export, plan


@pytest.mark.thorough
def test_evaluating_a_slim_and_an_exported_file_agrees_with_the_report(finished):
    folder, report = finished
    slim = dpm_cli.evaluate(folder / "slim.pt", recipe())
    assert (slim.kind, slim.macs, slim.params) == ("slim", report.slim.macs, report.slim.params)
    assert slim.accuracy == report.slim.accuracy
    assert slim.latency.keys() == {"torch"}
    assert "latency_in_batches" not in slim.to_dict()
    assert all(width % 4 == 0 and width % 8 for width in slim.odd_widths.values())
    batches = dpm_cli.evaluate(folder / "model.ts", recipe(), latency_batch=3).latency_in_batches["torchscript"]
    assert batches.batch == 3
    assert 0 < batches.low <= batches.median <= batches.high
    exported = dpm_cli.evaluate(folder / "model.ts", recipe(), latency=False)
    assert (exported.kind, exported.macs, exported.latency) == ("torchscript", report.slim.macs, {})
    assert (exported.params, exported.accuracy) == (report.slim.params, report.slim.accuracy)
    with pytest.raises(ModelFileError):
        dpm_cli.evaluate(folder / "report.json", recipe())


def test_evaluating_a_torch_export_archive_needs_trust(finished, tmp_path):
    folder, report = finished
    (made,) = dpm_cli.export_slim(folder / "slim.pt", formats=["pt2"], output=tmp_path)
    with pytest.raises(ModelFileError, match=r"torch.export archive, which may run code .* --trust"):
        dpm_cli.evaluate(made.path, recipe())
    measured = dpm_cli.evaluate(made.path, recipe(), trust=True)
    assert (measured.kind, measured.bytes) == ("pt2", made.bytes)
    assert measured.accuracy == report.slim.accuracy
    assert measured.latency.keys() == {"pt2"}


@pytest.mark.thorough
def test_size_of_an_openvino_file_counts_its_weights(finished, tmp_path):
    pytest.importorskip("openvino")
    (made,) = dpm_cli.export_slim(finished[0] / "slim.pt", formats=["openvino"], output=tmp_path)
    assert dpm_cli.evaluate(made.path, recipe(), latency=False).bytes == made.bytes


def test_slim_file_is_exported_again(finished, tmp_path):
    folder, report = finished
    (made,) = dpm_cli.export_slim(folder / "slim.pt", formats=["torchscript"], output=tmp_path / "new")
    assert made.max_difference <= 1e-4
    opened = open_exported(made.path)
    assert opened.metadata["dpm_recipe"] == report.recipe_hash
    with torch.no_grad():
        torch.testing.assert_close(opened(IMAGES), load(folder / "slim.pt")(IMAGES))
    with pytest.raises(OutputError, match="exists"):
        dpm_cli.export_slim(folder / "slim.pt", formats=["torchscript"], output=tmp_path / "new")
    with pytest.raises(OutputError, match="is a file"):
        dpm_cli.export_slim(folder / "slim.pt", formats=["torchscript"], output=folder / "slim.pt")
    with pytest.raises(UsageError, match="'coreml' is not known; known: torchscript, onnx"):
        dpm_cli.export_slim(folder / "slim.pt", formats=["coreml"], output=tmp_path)


def test_plan_says_what_can_be_reached(dense):
    plan = dpm_cli.inspect(dense, recipe())
    assert plan.arch == "digits"
    assert plan.dense["params"] == count_parameters(dense)
    assert plan.dense["channels"] == sum(group.units for group in plan.groups)
    assert plan.target.is_achievable
    assert plan.target.limit == plan.dense["macs"] // 2
    assert all(plan.lowest[kind] < cost for kind, cost in plan.dense.items())
    assert [kept.layer for kept in plan.kept] == ["linear"]
    impossible = dpm_cli.inspect(dense, recipe(prune={"target": {"params": 10}}))
    assert not impossible.target.is_achievable
    assert (impossible.planned, impossible.widths) == (None, None)
    assert not {"planned", "widths"} & impossible.to_dict().keys()


@pytest.mark.parametrize(("keep", "is_achievable"), [([], True), (["*"], False)])
def test_accuracy_can_only_be_traded_where_a_unit_may_leave(dense, keep, is_achievable):
    plan = dpm_cli.inspect(dense, recipe(prune={"target": {"drop": 1.0}, "keep": keep}))
    assert plan.target.is_achievable == is_achievable


def test_planned_widths_are_those_of_the_network_that_would_be_left(dense):
    plan = dpm_cli.inspect(dense, recipe())
    planned = plan.planned
    assert planned["macs"] <= plan.target.limit
    widths = {width.layer: width for width in plan.widths}
    assert {name: width.before for name, width in widths.items()} == {
        layer: dense.get_submodule(layer).out_channels for group in plan.groups for layer in group.layers
    }
    for group in plan.groups:
        assert {widths[layer].after for layer in group.layers} == {group.planned}
        assert group.planned % 4 == 0
    assert planned["channels"] == sum(group.planned for group in plan.groups)


def test_sensitivity_of_a_group_is_the_loss_without_its_weakest_units(dense):
    plan = dpm_cli.inspect(dense, recipe(), sensitivity=0.25, images=16)
    measured = plan.sensitivity
    assert (measured.share, measured.split) == (0.25, "validation")
    assert [row.group for row in measured.groups] == [group.name for group in plan.groups]
    for row in measured.groups:
        assert row.removed == row.units // 4
        assert 0 < row.macs_saved < 1
        assert row.loss != measured.loss


@pytest.mark.parametrize("share", [0, 1, 1.5])
def test_a_share_is_a_fraction(dense, share):
    with pytest.raises(UsageError, match="fraction"):
        dpm_cli.inspect(dense, recipe(), sensitivity=share)


def test_a_broken_recipe_is_refused_whatever_it_comes_as(dense_file, tmp_path):
    with pytest.raises(RecipeError, match=r"unknown key 'prune\.targt'"):
        dpm_cli.prune(dense_file, recipe(prune={"targt": 1}), output=tmp_path)
    with pytest.raises(RecipeError, match="do not fit"):
        dpm_cli.prune(dense_file, recipe(decay={"steps": 100}), output=tmp_path)
    assert not any(tmp_path.iterdir())


def test_slim_file_knows_its_recipe_and_report(finished):
    slim = load_slim(finished[0] / "slim.pt")
    assert yaml.safe_load(slim.recipe) == yaml.safe_load((finished[0] / "recipe.yaml").read_text())
    assert slim.report == finished[1].to_dict()


# ------------------------------------------------------------------------------------------------------- without labels


@pytest.fixture
def photos(tmp_path):
    """Forty images without classes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def without_labels(photos):
    data = {"name": "folder", "root": str(photos), "batch": 8, "labels": False, "limit": None}
    return recipe(data=data, train={"epochs": 0}, export=["onnx"])


@pytest.mark.thorough
def test_a_model_is_pruned_without_labels_and_without_training(tmp_path, dense, photos, monkeypatch):
    monkeypatch.setenv("DPM_CACHE", str(tmp_path / "cache"))
    report = dpm_cli.prune(dense, without_labels(photos), output=tmp_path / "out")
    assert report.target.is_met
    assert (report.dense.accuracy, report.slim.accuracy, report.validation_accuracy) == (None, None, None)
    assert "data.labels is false: no accuracy was measured" in report.notes
    assert Report.from_json((tmp_path / "out/report.json").read_text()) == report
    for file in ("slim.pt", "model.onnx"):
        result = dpm_cli.evaluate(tmp_path / "out" / file, without_labels(photos))
        assert (result.accuracy, result.loss) == (None, None)
        assert result.latency


@pytest.mark.thorough
def test_without_labels_the_dense_model_alone_teaches(tmp_path, dense, photos, monkeypatch):
    monkeypatch.setenv("DPM_CACHE", str(tmp_path / "cache"))
    settings = without_labels(photos) | {"train": {"epochs": 2, "distill": 1}}
    losses = []

    def listen(event):
        if event.kind == "epoch":
            losses.append(event.loss)

    report = dpm_cli.prune(dense, settings, output=tmp_path / "out", on_event=listen)
    assert report.target.is_met
    assert report.slim.accuracy is None
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


def test_what_needs_labels_is_refused_without_them(tmp_path, dense, photos):
    with pytest.raises(
        RecipeError, match=r"needs labels or the dense model alone .*: set train\.distill: 1, or train\.epochs: 0"
    ):
        dpm_cli.prune(dense, without_labels(photos) | {"train": {"epochs": 2}}, output=tmp_path / "out")
    with pytest.raises(RecipeError, match=r"prune\.max_drop is judged by labels"):
        dpm_cli.prune(dense, without_labels(photos) | {"prune": {"target": {"macs": 0.5}, "max_drop": 1}})
    with pytest.raises(RecipeError, match="training needs labels"):
        dpm_cli.train(without_labels(photos), output=tmp_path / "model.pt")
    with pytest.raises(UsageError, match="measured with labels"):
        dpm_cli.inspect(dense, without_labels(photos), sensitivity=0.5)

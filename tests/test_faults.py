"""Faults, each caused rather than pretended: one line, the right exit code, nothing half-written, nothing lost."""

import contextlib
import copy
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import digits_recipe
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dpm_cli
from dpm_cli.cli.outcome import explain
from dpm_cli.data import load_data
from dpm_cli.engine import checkpoint
from dpm_cli.engine.checkpoint import load_checkpoint
from dpm_cli.errors import DataError, DpmError, Interrupted, OutputError, RecipeError, RunError, TargetError
from dpm_cli.files import CHECKPOINT
from dpm_cli.measure import measure_in_turns
from dpm_cli.models import build, load
from dpm_cli.recipe.sections import Data
from dpm_cli.report import Report


@pytest.fixture(autouse=True)
def _short_latencies_and_own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))
    monkeypatch.setattr("dpm_cli.jobs.prune.write_page", lambda folder: None)  # tests/display draws it
    monkeypatch.setenv("DPM_CACHE", str(tmp_path / "cache"))


def recipe(**changes):
    """With fine-tuning, and a checkpoint every other step."""
    return digits_recipe.recipe(**{"finetune": {"epochs": 1}, "checkpoint": {"every": 2}} | changes)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    module = build("digits", classes=10, shape=(1, 8, 8))
    module(torch.randn(64, 1, 8, 8))
    return module.eval()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The weights of a run to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))
        patch.setattr("dpm_cli.jobs.prune.write_page", lambda folder: None)  # tests/display draws it
        dpm_cli.prune(model, recipe(), output=folder)
    return load(folder / "slim.pt").state_dict()


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_one_line(error, code):
    lines, found = explain(error)
    assert (len(lines), found) == (1, code)
    assert lines[0].startswith("error: ")
    assert "\n" not in str(error)


def assert_tidy(folder):
    """No temporary files, no lock."""
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@contextlib.contextmanager
def no_more_than(size):
    """Files cannot grow beyond `size` bytes: for a writer, the same as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fill_disk_at(stack, name, size, *, number=1):
    """An `on_event` that fills the disk when the event comes for the `number`-th time."""
    count = itertools.count(1)

    def watch(event):
        if name in (event.kind, getattr(event, "name", None)) and next(count) == number:
            stack.enter_context(no_more_than(size))

    return watch


# --------------------------------------------------------------------------------------- full and unwritable folders


@pytest.mark.thorough
def test_disk_full_while_a_checkpoint_is_written(model, whole, tmp_path):
    with contextlib.ExitStack() as stack, pytest.raises(RunError, match=r"checkpoint\.pt cannot be written") as error:
        dpm_cli.prune(model, recipe(), output=tmp_path, on_event=fill_disk_at(stack, "checkpoint", 50_000))
    assert_one_line(error.value, 1)
    assert_tidy(tmp_path)
    assert load_checkpoint(tmp_path / CHECKPOINT).state["step"] == 2
    dpm_cli.prune(model, recipe(), output=tmp_path, resume=True)
    assert_same_bits(load(tmp_path / "slim.pt").state_dict(), whole)


@pytest.mark.parametrize("size", [1, 700])
@pytest.mark.thorough
def test_disk_full_while_metrics_are_written(model, whole, tmp_path, size):
    with contextlib.ExitStack() as stack, pytest.raises(RunError, match=r"(metrics.jsonl|checkpoint.pt) cannot be"):
        dpm_cli.prune(model, recipe(), output=tmp_path, on_event=fill_disk_at(stack, "step", size, number=3))
    assert_tidy(tmp_path)
    dpm_cli.prune(model, recipe(), output=tmp_path, resume=True)
    assert_same_bits(load(tmp_path / "slim.pt").state_dict(), whole)


@pytest.mark.parametrize("format", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.thorough
def test_disk_full_while_an_export_is_written(model, whole, tmp_path, format):
    settings = recipe(export=[format])
    name = {"torchscript": r"model\.ts", "onnx": r"model\.onnx"}[format]
    said = rf"{name} cannot be written: File too large; the training is kept: --resume with --set export=\[\]"
    with contextlib.ExitStack() as stack, pytest.raises(RunError, match=said) as error:
        # after the last checkpoint: steps 2, 4, 6, 6 (stage), 2, 3 (stage)
        dpm_cli.prune(model, settings, output=tmp_path, on_event=fill_disk_at(stack, "checkpoint", 20_000, number=5))
    assert_one_line(error.value, 1)
    assert_tidy(tmp_path)
    assert not list(tmp_path.glob("model.*"))
    dpm_cli.prune(model, settings, output=tmp_path, resume=True)
    assert_same_bits(load(tmp_path / "slim.pt").state_dict(), whole)
    assert list(tmp_path.glob("model.*"))


@pytest.mark.parametrize("name", ["slim.pt", "recipe.yaml", "report.json"])
@pytest.mark.thorough
def test_disk_full_while_results_are_written(model, whole, tmp_path, monkeypatch, name):
    from dpm_cli import files

    with contextlib.ExitStack() as stack:

        def fill_disk_before(path, write):
            is_early = name == "recipe.yaml" and not path.exists()  # it is there from the first step on
            if path.name == name and not is_early:
                stack.enter_context(no_more_than(100))
            write_atomic(path, write)

        write_atomic = files.write_atomic
        monkeypatch.setattr("dpm_cli.files.write_atomic", fill_disk_before)
        monkeypatch.setattr("dpm_cli.models.slim.write_atomic", fill_disk_before)
        with pytest.raises(RunError, match=rf"{name} cannot be written: File too large") as error:
            dpm_cli.prune(model, recipe(), output=tmp_path)
    monkeypatch.setattr("dpm_cli.files.write_atomic", write_atomic)
    monkeypatch.setattr("dpm_cli.models.slim.write_atomic", write_atomic)
    assert_one_line(error.value, 1)
    assert_tidy(tmp_path)
    assert not (tmp_path / "report.json").exists()
    told = []
    dpm_cli.prune(model, recipe(), output=tmp_path, resume=True, on_event=lambda event: told.append(event.kind))
    assert "step" not in told  # no training is lost
    assert_same_bits(load(tmp_path / "slim.pt").state_dict(), whole)


@pytest.mark.thorough
def test_overwriting_run_that_fails_leaves_the_earlier_report(model, tmp_path):
    dpm_cli.prune(model, recipe(), output=tmp_path)
    before = (tmp_path / "report.json").read_bytes(), (tmp_path / "slim.pt").read_bytes()
    with contextlib.ExitStack() as stack:
        watch = fill_disk_at(stack, "checkpoint", 50_000)
        with pytest.raises(RunError, match="cannot be written"):
            dpm_cli.prune(model, recipe(), output=tmp_path, overwrite=True, on_event=watch)
    assert ((tmp_path / "report.json").read_bytes(), (tmp_path / "slim.pt").read_bytes()) == before
    assert_tidy(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"prune": {"target": {"macs": 0.0001}}}, TargetError),
        ({"data": {"name": "folder", "root": "absent"}}, DataError),
        ({"prune": {"rounds": 500}}, RecipeError),
    ],
)
@pytest.mark.thorough
def test_overwriting_run_that_cannot_begin_costs_no_checkpoint(model, whole, tmp_path, change, error):
    with pytest.raises(Interrupted):
        dpm_cli.prune(model, recipe(), output=tmp_path, should_stop=lambda: True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error):
        dpm_cli.prune(model, recipe(**change), output=tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    dpm_cli.prune(model, recipe(), output=tmp_path, resume=True)
    assert_same_bits(load(tmp_path / "slim.pt").state_dict(), whole)


@pytest.mark.thorough
def test_overwriting_run_is_not_mixed_with_the_earlier_one(model, tmp_path):
    with pytest.raises(Interrupted):
        dpm_cli.prune(model, recipe(), output=tmp_path, should_stop=lambda: True)
    with pytest.raises(KeyboardInterrupt):
        dpm_cli.prune(model, recipe(), output=tmp_path, overwrite=True, on_event=interrupt_at("stage"))
    assert load_checkpoint(tmp_path / CHECKPOINT) is None


def interrupt_at(name):
    def watch(event):
        if name in (event.kind, getattr(event, "name", None)):
            raise KeyboardInterrupt

    return watch


@contextlib.contextmanager
def as_nobody():
    """Root may write everywhere, so it becomes somebody who may not."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["start", "step", "measure"])
@pytest.mark.thorough
def test_folder_that_becomes_unwritable(model, whole, tmp_path, name):
    out = tmp_path / "out"
    with contextlib.ExitStack() as stack:
        seen = []

        def watch(event):
            if name in (event.kind, getattr(event, "name", None)) and not seen:
                seen.append(name)
                out.chmod(0o500)
                stack.callback(out.chmod, 0o700)
                stack.enter_context(as_nobody())

        with pytest.raises(RunError, match=r"cannot be written: Permission denied") as error:
            dpm_cli.prune(model, recipe(), output=out, on_event=watch)
    assert_one_line(error.value, 1)
    (out / ".dpm-lock").unlink(missing_ok=True)  # this file alone could not be removed; it blocks nobody
    assert_tidy(out)
    dpm_cli.prune(model, recipe(), output=out, resume=True)
    assert_same_bits(load(out / "slim.pt").state_dict(), whole)


@pytest.mark.parametrize("name", ["step", "measure"])
@pytest.mark.thorough
def test_folder_that_vanishes(model, tmp_path, name):
    out = tmp_path / "out"

    def watch(event):
        if name in (event.kind, getattr(event, "name", None)):
            shutil.rmtree(out, ignore_errors=True)

    with pytest.raises(RunError, match="cannot be written: No such file or directory") as error:
        dpm_cli.prune(model, recipe(), output=out, on_event=watch)
    assert_one_line(error.value, 1)


# -------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def photos(tmp_path):
    """Ten classes of thirteen images, all of them readable."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 13), ("test", 2)):
        for label in range(10):
            (tmp_path / "photos" / split / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / str(label) / f"{number}.png")
    return tmp_path / "photos"


def folder_recipe(photos, **data):
    return recipe(data={"name": "folder", "root": str(photos), "limit": None, "batch": 32, **data})


def damage(photos, *names):
    for name in names:
        (photos / name).write_bytes(b"no image")


@pytest.mark.parametrize("memory_limit", [2**31, 1])
@pytest.mark.thorough
def test_corrupt_images_are_named_counted_and_left_out_up_to_a_limit(model, photos, tmp_path, memory_limit):
    damage(photos, "train/3/4.png", "test/5/1.png")
    settings = folder_recipe(photos, max_corrupt=2, memory_limit=memory_limit, workers=0, validation=0)
    told = []
    report = dpm_cli.prune(model, settings, output=tmp_path / "out", on_event=told.append)
    (note,) = [note for note in report.notes if "unreadable" in note]
    assert note.startswith("2 images are unreadable and left out: ")
    assert "train/3/4.png" in note
    assert "test/5/1.png" in note
    assert any(event.kind == "note" and "unreadable" in event.text for event in told)
    result = dpm_cli.evaluate(tmp_path / "out" / "slim.pt", settings, latency=False)
    assert result.images == 19


@pytest.mark.parametrize("memory_limit", [2**31, 1])
def test_training_tells_of_corrupt_test_images_too(photos, tmp_path, memory_limit):
    damage(photos, "train/3/4.png", "test/5/1.png")
    settings, told = folder_recipe(photos, max_corrupt=2, memory_limit=memory_limit, workers=0, validation=0), []
    dpm_cli.train(settings, output=tmp_path / "model.pt", on_event=told.append)
    notes = [event.text for event in told if event.kind == "note" and "guesses" not in event.text]
    assert notes[-1].startswith("2 images are unreadable and left out: ")


@pytest.mark.parametrize("memory_limit", [2**31, 1])
@pytest.mark.parametrize("limit", [0, 1])
def test_one_corrupt_image_too_many_stops(model, photos, tmp_path, memory_limit, limit):
    damage(photos, "train/3/4.png", "train/5/1.png")
    settings = folder_recipe(photos, max_corrupt=limit, memory_limit=memory_limit, workers=0, validation=0)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"train/[35]/[41]\.png is not a readable image .*data\.max_corrupt") as error:
        dpm_cli.prune(model, settings, output=tmp_path / "out")
    assert_one_line(error.value, 2)
    assert_tidy(tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


def test_corrupt_image_shifts_no_label(photos):
    def load(memory_limit):
        data = Data(name="folder", root=photos, validation=0, workers=0, max_corrupt=1, memory_limit=memory_limit)
        return load_data(data, shape=(1, 8, 8), classes=10, seed=0)

    damage(photos, "train/3/4.png")
    memory, stream = load(2**31), load(1)
    assert len(memory.train) == 129
    batches = [list(each.train.batches(50, seed=0, epoch=0, augment=None)) for each in (memory, stream)]
    images, labels = (torch.cat(parts) for parts in zip(*batches[0]))
    streamed, streamed_labels = (torch.cat(parts) for parts in zip(*batches[1]))
    assert torch.equal(images, streamed)
    assert torch.equal(labels, streamed_labels)
    assert labels.bincount().tolist() == [13, 13, 13, 12, *[13] * 6]
    again = load(2**31)
    assert again.corrupt.note == memory.corrupt.note  # not forgotten by a cache


def test_batch_without_a_readable_image_stops(photos):
    damage(photos, *(f"train/0/{number}.png" for number in range(13)))
    data = Data(name="folder", root=photos, validation=0, memory_limit=1, workers=0, max_corrupt=99)
    splits = load_data(data, shape=(1, 8, 8), classes=10, seed=0)
    with pytest.raises(DataError, match="no image of a whole batch can be read; 13 images are unreadable"):
        list(splits.train.batches(13, seed=0, epoch=0, augment=None))


KILL_WORKERS = """
    import json, multiprocessing, os, signal, sys, torch
    import dpm_cli
    from dpm_cli.cli.outcome import explain

    torch.set_num_threads(1)

    def watch(event):
        if event.kind == "step" and event.step >= 3:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)

    try:
        dpm_cli.prune(sys.argv[1], json.loads(sys.argv[3]), output=sys.argv[2], on_event=watch)
    except Exception as error:
        print(explain(error))
"""


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.thorough
def test_killed_worker_is_one_line_and_the_run_goes_on_later(model, photos, tmp_path):
    settings = folder_recipe(photos, memory_limit=1, workers=1, batch=8)  # more batches to come than are read ahead
    whole, out = tmp_path / "whole", tmp_path / "out"
    dpm_cli.prune(model, settings, output=whole)

    torch.save(model.state_dict(), tmp_path / "model.pt")
    command = [sys.executable, "-c", textwrap.dedent(KILL_WORKERS), tmp_path / "model.pt", out, json.dumps(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout == (
        "(['error: a process that decodes images was killed, maybe for its memory; lower data.workers'], 1)\n"
    )
    assert_tidy(out)
    dpm_cli.prune(model, settings, output=out, resume=True)
    assert_same_bits(load(out / "slim.pt").state_dict(), load(whole / "slim.pt").state_dict())


def test_worker_killed_while_a_checkpoint_is_written_is_told_as_such(model, tmp_path, monkeypatch):
    class Killed(checkpoint._HashingFile):
        def write(self, data):
            if len(data) > 1000:
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")  # by torch's SIGCHLD
            return super().write(data)

    monkeypatch.setattr("dpm_cli.engine.checkpoint._HashingFile", Killed)
    with pytest.raises(RunError, match="a process that decodes images was killed") as error:
        dpm_cli.prune(model, recipe(), output=tmp_path)
    assert_one_line(error.value, 1)
    assert_tidy(tmp_path)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.thorough
def test_ctrl_c_does_not_reach_the_decoding_processes(model, photos, tmp_path):
    settings, stopping = folder_recipe(photos, memory_limit=1, workers=1), []

    def watch(event):
        if event.kind == "step" and event.step == 3:
            for worker in multiprocessing.active_children():  # a terminal signals them all
                os.kill(worker.pid, signal.SIGINT)
            stopping.append(True)

    with pytest.raises(Interrupted):
        dpm_cli.prune(model, settings, output=tmp_path / "out", on_event=watch, should_stop=lambda: bool(stopping))
    assert load_checkpoint(tmp_path / "out" / CHECKPOINT).state["step"] == 3


# ---------------------------------------------------------------------------------------------- numbers, memory, time


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite(model, tmp_path, number):
    broken, calls = copy.deepcopy(model), itertools.count()

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * number if next(calls) == 4 else gradient

    class Spoiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = broken

        def forward(self, x):
            logits = self.inner(x)
            return Spoil.apply(logits) if self.training else logits

    with pytest.raises(RunError, match=r"not finite in stage train (at|before) step \d+: lower train\.lr") as error:
        dpm_cli.prune(Spoiled(), recipe(checkpoint={"every": 1}), output=tmp_path)
    assert_one_line(error.value, 1)
    assert_tidy(tmp_path)
    assert all(
        tensor.isfinite().all()
        for tensor in load_checkpoint(tmp_path / CHECKPOINT).state["parts"]["trainee"]["model"].values()
    )


class Greedy(nn.Module):
    """Needs more memory than there is for a batch of more than eight images."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if self.training and len(x) > 8:
            torch.empty(2**46 * len(x))
        return self.inner(x)


@pytest.mark.thorough
def test_out_of_memory_says_which_batch_was_tried_and_which_to_try(model, tmp_path):
    greedy = Greedy(copy.deepcopy(model))
    for batch in (32, 16):
        said = rf"out of memory with data\.batch {batch}: try --set data\.batch={batch // 2} --overwrite"
        with pytest.raises(RunError, match=said) as error:
            dpm_cli.prune(greedy, recipe(data={"batch": batch}), output=tmp_path, overwrite=True)
        assert_one_line(error.value, 1)
        assert_tidy(tmp_path)
    dpm_cli.prune(greedy, recipe(data={"batch": 8}), output=tmp_path, overwrite=True)


def test_out_of_memory_with_one_image_suggests_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr("dpm_cli.jobs.train.build", lambda *_, **__: Greedy(nn.Linear(64, 10)))
    monkeypatch.setattr(Greedy, "forward", lambda self, x: torch.empty(2**46 * len(x)))
    with pytest.raises(RunError, match=r"out of memory with data\.batch 1: use smaller images"):
        dpm_cli.train(recipe(data={"batch": 1}, train={"optimizer": "sgd"}), output=tmp_path / "model.pt")
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.thorough
def test_clock_that_jumps_changes_nothing(model, whole, tmp_path, monkeypatch):
    jumps = np.random.default_rng(0)
    monkeypatch.setattr(time, "time", lambda: float(jumps.integers(-(10**9), 10**10)))
    monkeypatch.setattr(time, "time_ns", lambda: int(jumps.integers(-(10**9), 10**10)) * 10**9)
    report = dpm_cli.prune(model, recipe(), output=tmp_path)
    assert_same_bits(load(tmp_path / "slim.pt").state_dict(), whole)
    assert all(0 <= seconds < 60 for seconds in report.seconds.values())
    epochs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(event["images_per_second"] > 0 for event in epochs if event["event"] == "epoch")


def test_only_monotonic_clocks_are_asked():
    source = Path(dpm_cli.__file__).parent
    clocks = ("time.time(", "time.time_ns(", "datetime.now", "datetime.utcnow", "from time import")
    for path in source.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [clock for clock in clocks if clock in text], path


@pytest.mark.thorough
def test_damaged_report_does_not_pass_for_a_finished_run(model, tmp_path):
    dpm_cli.prune(model, recipe(), output=tmp_path)
    whole_report = (tmp_path / "report.json").read_text()
    assert Report.from_json(whole_report)
    (tmp_path / "report.json").write_text(whole_report[: len(whole_report) // 2])
    with pytest.raises(OutputError, match="is not a report") as error:
        dpm_cli.prune(model, recipe(), output=tmp_path, resume=True)
    assert isinstance(error.value, DpmError)
    assert_one_line(error.value, 2)

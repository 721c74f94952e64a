"""What belongs to the user stays: files without our mark, inputs among the outputs, the targets of links, pipes."""

import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from digits_recipe import recipe

import dpm_cli
from dpm_cli.cli.app import main
from dpm_cli.display.history import read_history
from dpm_cli.display.page import read_report
from dpm_cli.engine.checkpoint import load_checkpoint
from dpm_cli.errors import Interrupted, OutputError
from dpm_cli.files import CHECKPOINT, LOCK, MARKS, locked, prepare_output, previous_of
from dpm_cli.measure import measure_in_turns
from dpm_cli.models import build

PRECIOUS = "precious"


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state dict, in an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPM_DEBUG", raising=False)
    monkeypatch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))
    torch.manual_seed(0)
    torch.save(build("digits", classes=10, shape=(1, 8, 8)).state_dict(), "model.pt")
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe()))
    return tmp_path / "model.pt"


def prune(model: str | Path = "model.pt", **more: Any) -> Any:
    return dpm_cli.prune(model, more.pop("recipe", recipe()), output=more.pop("output", "out"), **more)


# ------------------------------------------------------------------------------------------------------ no mark of ours


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.previous.pt", "slim.pt", "model.bin"])
def test_model_among_the_files_of_a_run_is_refused(model: Path, name: str) -> None:
    Path("out").mkdir()
    given = model.rename(f"out/{name}")
    before = given.read_bytes()
    for more in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match=f"the model out/{name} is among the files that a run writes into out"):
            prune(f"out/{name}", **more)
    assert given.read_bytes() == before


def test_model_that_is_a_hard_link_to_a_file_of_the_run_is_refused(model: Path) -> None:
    Path("out").mkdir()
    os.link(model, "out/slim.pt")
    with pytest.raises(OutputError, match=r"the model model\.pt is among"):
        prune(overwrite=True)


def test_recipe_among_the_files_of_a_run_is_refused() -> None:
    Path("out").mkdir()
    Path("recipe.yaml").rename("out/recipe.yaml")
    with pytest.raises(OutputError, match=r"the recipe out/recipe\.yaml is among"):
        prune(recipe="out/recipe.yaml", overwrite=True)


@pytest.mark.parametrize("name", sorted({*MARKS, CHECKPOINT, "checkpoint.previous.pt"}))
@pytest.mark.every(4)
def test_file_without_our_mark_is_never_replaced(name: str) -> None:
    path = Path("out") / name.replace("*", "0.5")
    path.parent.mkdir()
    path.write_text(PRECIOUS)
    for more in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match=f"{path} was not written by dpm: move it"):
            prune(**more)
    assert path.read_text() == PRECIOUS
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
def test_everything_that_a_run_writes_carries_its_mark() -> None:
    pytest.importorskip("openvino")
    formats = ["torchscript", "onnx", "pt2", "openvino"]
    stop = iter([False] * 5 + [True] * 99)
    with pytest.raises(Interrupted):
        prune(recipe=recipe(export=formats, checkpoint={"every": 1}), should_stop=lambda: next(stop))
    assert {CHECKPOINT, "checkpoint.previous.pt"} <= {path.name for path in Path("out").iterdir()}
    prune(recipe=recipe(export=formats), overwrite=True)
    assert {path.name for path in Path("out").iterdir()} == {*MARKS} - {
        "slim-*.pt",
        "model.fp16.onnx",
        "model.int8.onnx",
        "model.pte",
    }
    prepare_output(Path("out"), overwrite=True, resume=False)


@pytest.mark.thorough
@pytest.mark.parametrize(("format", "name"), [("torchscript", "model.ts"), ("openvino", "model.bin")])
def test_export_replaces_only_files_of_ours(format: str, name: str) -> None:
    if format == "openvino":
        pytest.importorskip("openvino")
    prune()
    Path(name).write_text(PRECIOUS)
    assert main(["export", "out/slim.pt", "--format", format, "--overwrite"]) == 2
    assert Path(name).read_text() == PRECIOUS


def test_table_does_not_replace_the_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.read_bytes()
    assert main(["inspect", "model.pt", "-r", "recipe.yaml", "--csv", "model.pt"]) == 2
    assert "the model model.pt is among" in capsys.readouterr().err
    assert model.read_bytes() == before


def test_training_does_not_replace_what_it_starts_from_nor_a_foreign_checkpoint(model: Path) -> None:
    before = model.read_bytes()
    with pytest.raises(OutputError, match=r"the model model\.pt is among"):
        dpm_cli.train(recipe(), model="model.pt", output="model.pt", overwrite=True)
    Path("new.checkpoint.pt").write_text(PRECIOUS)
    for more in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(OutputError, match=r"new.checkpoint\.pt was not written by dpm"):
            dpm_cli.train(recipe(), output="new.pt", **more)
    assert model.read_bytes() == before
    assert Path("new.checkpoint.pt").read_text() == PRECIOUS


# --------------------------------------------------------------------------------------------------------------- links


def assert_refused_and_kept(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In every mode, in one line, and the target of a link keeps its content."""
    for more in ([], ["--overwrite"], ["--resume"]):
        capsys.readouterr()
        assert main(["prune", "model.pt", "-r", "recipe.yaml", "--quiet", *more]) == 2
        said = capsys.readouterr().err
        assert what in said
        assert said.count("\n") == 1
    assert not Path("mine").exists() or Path("mine").read_text() == PRECIOUS


@pytest.mark.parametrize("name", [LOCK, "metrics.jsonl", "report.json", "slim.pt", "recipe.yaml", "checkpoint.pt"])
@pytest.mark.parametrize("target", ["mine", "nowhere"])
@pytest.mark.every(3)
def test_no_link_is_followed(name: str, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("mine").write_text(PRECIOUS)
    (Path("out") / name).symlink_to(Path.cwd() / target)
    assert_refused_and_kept(f"out/{name} is a link", capsys)
    assert (Path("out") / name).is_symlink()


@pytest.mark.parametrize("linked", [True, False])
def test_lock_that_is_not_ours_is_kept(linked: bool, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("mine").write_text(PRECIOUS)
    (Path("out") / LOCK).hardlink_to("mine") if linked else (Path("out") / LOCK).write_text(PRECIOUS)
    assert_refused_and_kept(f"out/{LOCK} is no lock of dpm", capsys)
    assert (Path("out") / LOCK).read_text() == PRECIOUS


@pytest.mark.thorough
def test_link_that_appears_during_a_run_is_not_followed(model: Path) -> None:
    Path("mine").write_text(PRECIOUS)

    def link(event: Any) -> None:
        if event.kind == "step" and event.step == 1:
            Path("out/slim.pt").symlink_to(Path.cwd() / "mine")
            Path("out/report.json").symlink_to(Path.cwd() / "mine")

    prune(on_event=link)
    assert Path("mine").read_text() == PRECIOUS
    assert not Path("out/slim.pt").is_symlink()


@pytest.mark.thorough
def test_output_folder_may_be_a_link() -> None:
    Path("elsewhere").mkdir()
    Path("out").symlink_to("elsewhere")
    report = prune()
    assert Path("elsewhere/report.json").exists()
    assert report.versions["processes"] == 1
    assert {"threads", "cpu", "torch", "python", "dpm"} <= report.versions.keys()


def test_training_does_not_follow_a_link(model: Path) -> None:
    Path("mine").write_text(PRECIOUS)
    Path("new.pt").symlink_to("mine")
    with pytest.raises(OutputError, match=r"new\.pt is a link"):
        dpm_cli.train(recipe(), output="new.pt", overwrite=True)
    Path(f"{LOCK}-other").symlink_to("mine")
    with pytest.raises(OutputError, match="is a link"):
        dpm_cli.train(recipe(), output="other.pt")
    assert Path("mine").read_text() == PRECIOUS


# ------------------------------------------------------------------------------------------- pipes, devices and folders


@pytest.mark.parametrize("name", [LOCK, "checkpoint.pt", "checkpoint.previous.pt", "report.json", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
@pytest.mark.every(3)
def test_only_regular_files_are_opened(name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("out") / name
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    assert_refused_and_kept(f"out/{name}", capsys)


@pytest.mark.thorough
def test_leftover_that_is_a_folder_is_left_alone() -> None:
    Path("out/.slim-01234567.pt").mkdir(parents=True)
    Path("out/.slim-0.5-01234567.pt").touch()
    prune()
    assert Path("out/.slim-01234567.pt").is_dir()
    assert not Path("out/.slim-0.5-01234567.pt").exists()


def test_checkpoint_that_is_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / CHECKPOINT)
    with pytest.raises(dpm_cli.DpmError, match="cannot be read"):
        load_checkpoint(tmp_path / CHECKPOINT)


def test_pipe_in_place_of_a_text_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("report.json", "metrics.jsonl", "model.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(OutputError, match="is not the report of a run"):
        read_report(tmp_path)
    assert read_history(tmp_path / "metrics.jsonl").epochs == []
    with pytest.raises(dpm_cli.DpmError, match=r"model\.json cannot be read"):
        dpm_cli.read_metadata(tmp_path / "model.json")


def test_report_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "report.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(OutputError, match=r"is not the report of a run .larger than \d+ bytes"):
        read_report(tmp_path)


# ------------------------------------------------------------------------------------------------------ names and locks


def test_name_that_is_not_utf8_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    odd = os.fsdecode(b"out-\xff")
    assert main(["prune", "model.pt", "-r", "recipe.yaml", "--quiet", "-o", odd]) == 2
    assert main(["train", "-r", "recipe.yaml", "--quiet", "-o", f"{odd}.pt"]) == 2
    assert main(["export", "model.pt", "-o", odd]) == 2
    assert "is not UTF-8: choose another --output" in capsys.readouterr().err
    assert not list(Path().glob("out-*"))


@pytest.mark.thorough
def test_file_system_without_locks_has_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lock: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(OutputError, match="cannot be locked: Operation not supported; --no-lock does without"):
        prune()
    prune(lock=False)
    dpm_cli.train(recipe(), output="trained.pt", lock=False)
    with locked(Path("out"), wanted=False):
        assert not (Path("out") / LOCK).exists()


@pytest.mark.parametrize("name", [CHECKPOINT, "checkpoint.previous.pt"])
def test_hard_stop_finds_either_checkpoint(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dpm_cli, "prune", stop)
    Path("out").mkdir()
    (Path("out") / name).touch()
    assert main(["prune", "model.pt", "-r", "recipe.yaml", "--quiet"]) == 130
    assert "continue from its last checkpoint with --resume" in capsys.readouterr().err


@pytest.mark.thorough
def test_previous_checkpoint_alone_is_resumed(model: Path) -> None:
    stop = iter([False] * 5 + [True] * 99)
    with pytest.raises(Interrupted):
        prune(recipe=recipe(checkpoint={"every": 1}), should_stop=lambda: next(stop))
    checkpoint = Path("out") / CHECKPOINT
    checkpoint.unlink()
    assert previous_of(checkpoint).exists()
    with pytest.raises(OutputError, match="unfinished run"):
        prune(recipe=recipe(checkpoint={"every": 1}))
    told: list[str] = []
    prune(recipe=recipe(checkpoint={"every": 1}), resume=True, on_event=lambda event: told.append(event.kind))
    assert "resumed" in told

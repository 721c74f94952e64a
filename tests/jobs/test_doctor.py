"""`dpm doctor` says what is in a folder and how to go on, changes nothing, and is not taken in by what lies there."""

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from digits_recipe import recipe

import dpm_cli
from dpm_cli.cli.app import main
from dpm_cli.display.page import read_report
from dpm_cli.errors import Interrupted, OutputError
from dpm_cli.files import CHECKPOINT, LOCK, MARKS, locked
from dpm_cli.jobs.doctor import examine
from dpm_cli.measure import measure_in_turns
from dpm_cli.models import build
from dpm_cli.report import ExportedFile, FloorReport, TargetReport
from dpm_cli.results import Examined

OFTEN = recipe(checkpoint={"every": 1}, export=["torchscript"])


@pytest.fixture(autouse=True)
def _in_an_empty_folder(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPM_DEBUG", raising=False)
    monkeypatch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))
    monkeypatch.setattr("dpm_cli.jobs.prune.write_page", lambda folder: None)  # tests/display draws it
    shutil.copy(runs / "my model.pt", tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(OFTEN))


def stop_after(steps: int) -> Callable[[], bool]:
    answers = iter([False] * (steps - 1) + [True] * 99)
    return lambda: next(answers)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a run that was stopped after step 3, and one that is finished."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))
        patch.setattr("dpm_cli.jobs.prune.write_page", lambda folder: None)  # tests/display draws it
        torch.manual_seed(0)
        torch.save(build("digits", classes=10, shape=(1, 8, 8)).state_dict(), "my model.pt")
        with pytest.raises(Interrupted):
            dpm_cli.prune("my model.pt", OFTEN, output="stopped", should_stop=stop_after(3))
        dpm_cli.prune("my model.pt", OFTEN, output="finished")
    return folder


@pytest.fixture
def stopped(runs: Path) -> Path:
    return Path(shutil.copytree(runs / "stopped", "out"))


@pytest.fixture
def finished(runs: Path) -> Path:
    return Path(shutil.copytree(runs / "finished", "out"))


def snapshot(folder: Path) -> dict[str, Any]:
    return {
        path.name: (path.lstat().st_mtime_ns, path.lstat().st_size, path.lstat().st_ino) for path in folder.iterdir()
    } | {"": folder.lstat().st_mtime_ns}


def examine_unchanged(folder: Path) -> Examined:
    before = snapshot(folder)
    found = examine(folder)
    assert snapshot(folder) == before
    return found


def command_of(found: Examined) -> list[str]:
    """The one command of the advice, as a shell would read it."""
    (sentence,) = found.advice
    return shlex.split(
        sentence.rpartition(": dpm ")[2].removesuffix(" goes on").removesuffix(" starts at the beginning")
    )


@pytest.mark.thorough
def test_stopped_run_goes_on_by_the_command_that_is_told(stopped: Path) -> None:
    found = examine_unchanged(stopped)
    assert (found.state, found.problem) == ("unfinished", None)
    assert "digits on digits, stage 1, after step 3" in found.advice[0]
    assert {each.name: each.state for each in found.files} == dict.fromkeys(
        ["checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl", "recipe.yaml"], "whole"
    )
    assert command_of(found) == ["prune", "my model.pt", "-o", "out", "--resume"]
    assert main([*command_of(found), "--quiet"]) == 0
    assert examine_unchanged(stopped).state == "finished"


@pytest.mark.thorough
def test_stopped_training_goes_on_by_the_command_that_is_told() -> None:
    with pytest.raises(Interrupted):
        dpm_cli.train(OFTEN, output="new.pt", should_stop=stop_after(2))
    found = examine_unchanged(Path())
    assert found.state == "unfinished"
    assert command_of(found) == ["train", "-o", "new.pt", "--resume"]
    assert main([each.replace("RECIPE", "recipe.yaml") for each in command_of(found)]) == 0
    assert "unfinished" not in examine(".").advice


@pytest.mark.thorough
def test_nothing_saved_yet(stopped: Path) -> None:
    for name in (CHECKPOINT, "checkpoint.previous.pt"):
        (stopped / name).unlink()
    found = examine_unchanged(stopped)
    assert found.state == "begun"
    assert main([*command_of(found), "--quiet"]) == 0


@pytest.mark.thorough
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
def test_checkpoint_before_the_newest_is_found(stopped: Path, damage: Callable[[Path], object]) -> None:
    damage(stopped / CHECKPOINT)
    found = examine_unchanged(stopped)
    assert "after step 2 (from checkpoint.previous.pt, as the newest is damaged or missing)" in found.advice[0]
    assert main([*command_of(found), "--quiet"]) == 0


def test_two_damaged_checkpoints_are_one_line(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (CHECKPOINT, "checkpoint.previous.pt"):
        (stopped / name).write_bytes((stopped / name).read_bytes()[:-1])
    assert main(["doctor", "out"]) == 2
    out, err = capsys.readouterr()
    assert err == (
        "error: out/checkpoint.pt and out/checkpoint.previous.pt cannot be read or fail their checksum; start again "
        "with --overwrite\n"
    )
    assert "goes on" not in out


@pytest.mark.parametrize("name", ["slim.pt", "report.json", "model.ts", "metrics.jsonl"])
def test_finished_run_whose_results_are_damaged(finished: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "out"]) == 0
    assert "finished" in capsys.readouterr().out
    (finished / name).unlink()
    if name == "report.json":
        assert examine(finished).state == "begun"
        return
    assert main(["doctor", "out"]) == 2
    assert capsys.readouterr().err == f"error: out/{name} is missing; run again with --overwrite\n"


MISSED = [
    ({"floor": FloorReport(1.0, 90.0, 89.0, True, "round 1 broke the floor")}, "exit code 4: round 1 broke the floor;"),
    ({"target": TargetReport("macs", 0.5, 60, 100, 75)}, "exit code 3: target macs ≤ 60 is not met"),
]


@pytest.mark.parametrize(("change", "said"), MISSED, ids=["floor", "target"])
def test_finished_run_that_missed_something_says_so(finished: Path, change: dict[str, Any], said: str) -> None:
    (finished / "report.json").write_text(replace(read_report(finished), **change).to_json())
    found = examine(finished)
    assert found.state == "finished"
    assert said in found.advice[0]


def test_truncated_results_are_damaged(finished: Path) -> None:
    for name in ("model.ts", "slim.pt", "report.json"):
        path = finished / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) - 40])
        found = examine(finished)
        assert found.state == "broken"
        assert f"out/{name}" in str(found.problem)
        path.write_bytes(whole)
    assert examine(finished).state == "finished"


def test_openvino_file_is_its_graph_with_the_weights(finished: Path) -> None:
    report = read_report(finished)
    (finished / "model.xml").write_bytes(MARKS["model.xml"])
    (finished / "model.bin").write_bytes(MARKS["model.bin"])
    made = ExportedFile("openvino", "out/model.xml", len(MARKS["model.xml"] + MARKS["model.bin"]), 0.0)
    (finished / "report.json").write_text(replace(report, exports=[*report.exports, made]).to_json())
    assert examine(finished).state == "finished"
    (finished / "model.bin").unlink()
    assert examine(finished).problem == "out/model.bin is missing; run again with --overwrite"


def test_run_that_writes_there_now(stopped: Path) -> None:
    with locked(stopped):
        found = examine(stopped)
    assert found.state == "busy"
    assert found.advice[0].startswith(f"in use by process {os.getpid()}")
    (stopped / LOCK).write_text("process 1")  # of a process that was killed
    assert examine_unchanged(stopped).state == "unfinished"


def test_folders_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert examine("empty").state == "empty"
    for name in ("absent", "recipe.yaml", "a\0b"):
        with pytest.raises(OutputError, match="cannot be read"):
            examine(name)
    assert main(["doctor", "absent"]) == 2
    assert (
        capsys.readouterr().err
        == "error: 'absent' cannot be read: No such file or directory; give the folder of a run\n"
    )


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def place_bomb(out: Path) -> None:
    torch.save({"format": "dpm-slim", "state_dict": Bomb()}, out / "slim.pt")


def place_links(out: Path) -> None:
    (out / CHECKPOINT).symlink_to("/dev/zero")
    (out / "slim-\x1b[2J\n.pt").symlink_to("nowhere")


def place_pipes(out: Path) -> None:
    for name in (CHECKPOINT, "slim.pt", "report.json", LOCK, "new.checkpoint.pt", ".slim-01234567.pt"):
        os.mkfifo(out / name)


def place_folders(out: Path) -> None:
    for name in (CHECKPOINT, "recipe.yaml", "metrics.jsonl", LOCK):
        (out / name).mkdir()


def place_rubbish(out: Path) -> None:
    for name in (CHECKPOINT, "slim.pt", "report.json", "recipe.yaml", "model.onnx"):
        (out / name).write_bytes(bytes(range(256)) * 9)


def place_lies(out: Path) -> None:
    (out / "report.json").write_text('{\n  "arch": ' + "[" * 10_000)
    (out / "recipe.yaml").write_text(
        "# resolved by dpm\n# model: " + "[" * 10_000 + "\n# model: 3\n!!python/name:os.abort x"
    )


@pytest.mark.parametrize("place", [place_bomb, place_links, place_pipes, place_folders, place_rubbish, place_lies])
def test_hostile_folder_is_one_line(place: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("out")
    out.mkdir()
    place(out)
    before = snapshot(out)
    assert main(["doctor", "out"]) == 2
    said = capsys.readouterr()
    assert snapshot(out) == before
    assert said.err.startswith("error: out/")
    assert said.err.count("\n") == 1
    assert all(line.isprintable() for line in (said.out + said.err).splitlines())
    assert not Path("executed").exists()


def test_model_that_a_stranger_names_is_quoted(stopped: Path) -> None:
    text = (stopped / "recipe.yaml").read_text().replace('"my model.pt"', '"$(touch executed); x"')
    (stopped / "recipe.yaml").write_text(text)
    assert "dpm prune '$(touch executed); x' -o out --resume" in examine(stopped).advice[0]


def test_recipe_that_names_code_needs_trust(stopped: Path) -> None:
    path = stopped / "recipe.yaml"
    path.write_text(path.read_text().replace("arch: digits", "arch: nets:Net"))
    (recipe_found,) = [each for each in examine(stopped).files if each.name == "recipe.yaml"]
    assert "needs --trust (model.arch: nets:Net)" in recipe_found.what


def test_leftovers_and_others_are_told_apart(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stopped / ".checkpoint-01234567.pt").touch()
    (stopped / "notes.txt").touch()
    assert main(["doctor", "out"]) == 0
    out = capsys.readouterr().out
    assert "leftover: a killed process left it behind" in out
    assert "1 others, which no run touches" in out
    assert main(["doctor", "out", "--json"]) == 0

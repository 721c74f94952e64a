"""What bad input gets, end to end: one line with the thing and the way out, the right exit code, nothing written."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import dpm_cli
from dpm_cli.files import MAGIC, MARKS
from dpm_cli.models import build
from dpm_cli.recipe import dump_recipe, load_recipe

EXECUTED = "executed.txt"


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(EXECUTED),))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of an untrained digits net."""
    path = tmp_path_factory.mktemp("dense") / "dense.pt"
    torch.manual_seed(0)
    torch.save(build("digits", classes=10, shape=(1, 8, 8)).state_dict(), path)
    return path


def make_model_file(kind: str, path: Path, dense: Path) -> None:
    """Write a file that is not a usable model."""
    match kind:
        case "missing":
            pass
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "truncated":
            path.write_bytes(dense.read_bytes()[:1000])
        case "picture":
            path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
        case "text":
            path.write_text("weights: none")
        case "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("readme.txt", "hello")
        case "torchscript":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("model/constants.pkl", b"")
                archive.writestr("model/code/__torch__.py", "")
                archive.writestr("model/data.pkl", b"")
        case "pickled module":
            torch.save(nn.Linear(2, 2), path)
        case "malicious pickle":
            torch.save({"model": Malicious()}, path)
        case "other model":
            torch.save(nn.Linear(2, 2).state_dict(), path)
        case "number":
            torch.save(3, path)


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "empty",
        "folder",
        "truncated",
        "picture",
        "text",
        "zip",
        "torchscript",
        "pickled module",
        "malicious pickle",
        "other model",
        "number",
    ],
)
@pytest.mark.every(2)
def test_a_bad_model_file_is_named_in_one_line(dpm: Any, dense: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.pt"
    make_model_file(kind, path, dense)
    for arguments in (("prune", path), ("inspect", path), ("evaluate", path)):
        ended = dpm(*arguments, "-r", "digits")
        assert ended.code == 2
        (line,) = ended.err.splitlines()
        assert line.startswith("error: ")
        assert "model.pt" in line
        assert ended.out == ""
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / EXECUTED).exists()


def test_an_unknown_choice_is_told_in_our_words(dpm: Any) -> None:
    ended = dpm("export", "slim.pt", "--format", "tflite")
    assert ended.code == 2
    assert ended.err.startswith("error: Invalid value for '--format': 'tflite' is not one of 'torchscript'")


def test_a_bad_model_file_with_json_is_one_document(dpm: Any) -> None:
    ended = dpm("prune", "nowhere.pt", "-r", "digits", "--json")
    document = json.loads(ended.out)
    assert ended.code == document["exit_code"] == 2
    assert "nowhere.pt" in document["error"]


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ("prune.target.macs=0.001", 3, "cannot be met: between"),
        ("prune.target.macs=99G", 3, "keeps everything"),
        ("prune.base=magic", 2, "prune.base is 'magic'; known: 'depgraph'"),
        ("prune.roundz=3", 2, "did you mean 'rounds'?"),
        ("train.lr=fast", 2, "train.lr is 'fast'"),
        ("decay.steps=100000", 2, "do not fit"),
        ("model.arch=digit", 2, "did you mean 'digits'?"),
        ("model.classes=9", 2, "classes"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused_before_training(
    dpm: Any, dense: Path, setting: str, code: int, said: str
) -> None:
    ended = dpm("prune", dense, "-r", "digits", "--set", setting)
    assert ended.code == code
    *_, line = ended.err.splitlines()  # after what is told on a slow machine
    assert line.startswith("error: ")
    assert said in line


def test_an_absent_recipe_and_broken_yaml_are_named(dpm: Any, dense: Path, tmp_path: Path) -> None:
    assert "neither a file nor a shipped recipe" in dpm("prune", dense, "-r", "nowhere.yaml").err
    (tmp_path / "broken.yaml").write_text("model: [")
    ended = dpm("prune", dense, "-r", "broken.yaml")
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1


def test_absent_data_and_its_layout_are_named(dpm: Any, tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    torch.save(build("resnet20", classes=10, shape=(3, 32, 32)).state_dict(), model)
    changes = ("--set", "model.arch=resnet20", "--set", "data.root=nowhere")
    ended = dpm("prune", model, "-r", "resnet56-folder", *changes)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "nowhere is not a folder" in line
    assert "train/<class>" in line


def test_data_that_cannot_be_downloaded_names_folder_and_files(dpm: Any) -> None:
    changes = ("--set", "model.arch=resnet20", "--set", "data.root=nowhere", "--set", "data.download=false")
    ended = dpm("train", "-r", "cifar10", *changes)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "nowhere" in line


@pytest.mark.parametrize("command", ["prune", "train"])
def test_an_unknown_device_names_those_that_are_there(dpm: Any, dense: Path, command: str) -> None:
    arguments = (command, dense) if command == "prune" else (command,)
    ended = dpm(*arguments, "-r", "digits", "--device", "tpu")
    assert ended.code == 2
    assert "device is 'tpu'; here: auto, cpu" in ended.err
    assert not Path("out").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_is_named(dpm: Any, dense: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    ended = dpm("prune", dense, "-r", "digits", "-o", place)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert place in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("present", "way_out"),
    [(["report.json"], "--overwrite"), (["checkpoint.pt"], "--resume"), (["slim.pt"], "--overwrite")],
)
def test_results_that_are_there_are_not_overwritten(
    dpm: Any, dense: Path, tmp_path: Path, present: list[str], way_out: str
) -> None:
    (tmp_path / "out").mkdir()
    for name in present:
        (tmp_path / "out" / name).write_bytes(MARKS.get(name, MAGIC) + b"precious")
    ended = dpm("prune", dense, "-r", "digits")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert way_out in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == present
    assert all((tmp_path / "out" / name).read_bytes().endswith(b"precious") for name in present)


def test_train_does_not_overwrite_a_model(dpm: Any, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("precious")
    ended = dpm("train", "-r", "digits")
    assert ended.code == 2
    assert "--overwrite" in ended.err
    assert (tmp_path / "model.pt").read_text() == "precious"


def test_export_of_anything_but_a_slim_file_is_refused(dpm: Any, dense: Path, tmp_path: Path) -> None:
    ended = dpm("export", dense, "-o", tmp_path / "there")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "is not a slim.pt" in line


def test_resume_without_a_run_starts_one_and_overwrite_contradicts_it(dpm: Any, dense: Path) -> None:
    ended = dpm("prune", dense, "-r", "digits", "--resume", "--overwrite")
    assert ended.code == 2
    assert "give one of them" in ended.err


@pytest.mark.slow
def test_the_whole_way_in_small(dpm: Any, tmp_path: Path) -> None:
    small = {"dense": {"epochs": 2}, "train": {"epochs": 2}, "finetune": {"epochs": 1}}
    values = yaml.safe_load(dump_recipe(load_recipe("digits")))
    for name, change in small.items():
        values[name] |= change
    values["prune"] |= {"rounds": 1}
    values["decay"]["steps"] = 8
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))

    assert dpm("train", "-r", "small.yaml", "-o", "dense.pt", "--quiet").code == 0
    ended = dpm("prune", "dense.pt", "-r", "small.yaml", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["slim"]["macs"] <= report["target"]["limit"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    for name in ("slim.pt", "model.ts", "model.onnx"):
        result = json.loads(dpm("evaluate", f"out/{name}", "-r", "small.yaml", "--json").out)
        assert result["accuracy"] == pytest.approx(report["slim"]["accuracy"], abs=0.3)
    assert isinstance(dpm_cli.load(tmp_path / "out" / "slim.pt"), nn.Module)

    again = dpm("prune", "dense.pt", "-r", "small.yaml")
    assert (again.code, "holds a finished run" in again.err) == (2, True)
    resolved = dpm("prune", "dense.pt", "-r", "out/recipe.yaml", "-o", "again", "--json", "--quiet")
    assert json.loads(resolved.out)["recipe_hash"] == report["recipe_hash"]
    assert dpm("export", "again/slim.pt", "-o", "files").code == 0
    shutil.rmtree(tmp_path / "again")


@pytest.mark.slow
def test_the_demo_halves_the_macs_and_keeps_the_accuracy(dpm: Any) -> None:
    ended = dpm("demo", "--json", "--quiet")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["slim"]["macs"] <= report["dense"]["macs"] / 2
    assert report["slim"]["accuracy"] >= report["dense"]["accuracy"] - 1.0
    assert report["dense"]["accuracy"] > 97
    assert {each["format"] for each in report["exports"]} == {"torchscript", "onnx"}
    assert all(each["max_difference"] <= 1e-4 for each in report["exports"])


def test_removed_current_folder_is_one_line(dpm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of torch's would end the process, with a line of its own."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    ended = dpm("doctor", ".")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: the current folder has been removed: change into another\n"
    assert dpm("--help").code == 0

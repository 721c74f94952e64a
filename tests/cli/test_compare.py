"""Many runs in one table; and the loop of the README, as it stands there."""

import csv
import io
import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from made_up_report import make_report

import dpm_cli
from dpm_cli.cli.compared import name_runs
from dpm_cli.errors import Interrupted
from dpm_cli.models import build
from dpm_cli.recipe import dump_recipe, load_recipe
from dpm_cli.report import Report, TargetReport

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """The reports of two runs; the second missed its target and measured little."""
    missed = TargetReport("macs", 0.3, 37_000_000, 125_747_840, 59_020_000)
    bare = make_report(arch=None, target=missed)
    bare = replace(bare, dense=replace(bare.dense, accuracy=None, latency={}))
    paths = []
    for name, report in (("half", make_report()), ("third", bare)):
        (tmp_path / "out" / name).mkdir(parents=True)
        paths.append(tmp_path / "out" / name / "report.json")
        paths[-1].write_text(report.to_json())
    return paths


def test_runs_stand_in_one_table(dpm: Any, runs: list[Path]) -> None:
    ended = dpm("compare", *runs)
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"half +resnet56 +59\.0 M +46\.9 % +431\.0 K +93\.10 % +−0\.43 +2\.00×", ended.out)
    assert re.search(r"third +– +59\.0 M +46\.9 % +431\.0 K +93\.10 % +– +– \*", ended.out)
    assert "* the target was not met" in ended.out
    assert "faster: latency of single images in ONNX Runtime, dense / slim" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80


def test_a_drop_that_allowed_no_removal_is_marked(dpm: Any, runs: list[Path]) -> None:
    runs[0].write_text(make_report(target=TargetReport("drop", 1.0, 1000, 1000, 1000)).to_json())
    assert "* the target was not met" in dpm("compare", runs[0]).out


def test_long_names_are_not_broken_in_a_pipe(dpm: Any, runs: list[Path]) -> None:
    name = "a long name " * 8 + "end"
    runs[0].parent.rename(runs[0].parent.parent / name)
    assert name in dpm("compare", f"out/{name}", runs[1]).out


def test_csv_and_json_hold_the_same_numbers(dpm: Any, runs: list[Path]) -> None:
    rows = json.loads(dpm("compare", *runs, "--json").out)
    table = list(csv.DictReader(io.StringIO(dpm("compare", *runs, "--csv").out)))
    assert [[str("" if value is None else value) for value in row.values()] for row in rows] == [
        list(row.values()) for row in table
    ]
    assert rows[0]["run"] == "half"
    assert (rows[0]["macs"], rows[0]["accuracy_dense"], rows[0]["met"]) == (59_020_000, 93.53, True)
    assert (rows[0]["faster_torch"], rows[0]["faster_onnxruntime"]) == (1.25, 2.0)
    assert (rows[1]["met"], rows[1]["faster_torch"]) == (False, None)


def test_a_folder_stands_for_its_report(dpm: Any, runs: list[Path]) -> None:
    assert dpm("compare", *(path.parent for path in runs)).out == dpm("compare", *runs).out


def changed(**changes: Any) -> str:
    return json.dumps(make_report().to_dict() | changes)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "null", "{", "[" * 100_000, "\ufeff{}", '{"target": 3}',
        changed(arch=3), changed(dense={}), changed(seconds={"train": "long"}), changed(seed=True), changed(extra=1),
        changed(slim=make_report().to_dict()["slim"] | {"macs": "many"}),
        changed(dense=make_report().to_dict()["dense"] | {"latency": {"torch": {"median": None, "low": 1, "high": 1}}}),
        changed(widths=[{"layer": 1, "before": 2, "after": 3}]),
    ],
)  # fmt: skip
def test_what_is_no_report_is_named_in_one_line(dpm: Any, runs: list[Path], text: str) -> None:
    runs[1].write_text(text)
    ended = dpm("compare", *runs)
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert f"{runs[1]} is not the report of a run" in line


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\x80\x04", "not text"), (b'{"step": 1}\n{"step": 2}\n', "not one JSON document")]
)
def test_what_is_no_report_is_named_in_plain_words(dpm: Any, runs: list[Path], content: bytes, reason: str) -> None:
    runs[1].write_bytes(content)
    assert f"is not the report of a run ({reason}): give the folder of a finished run" in dpm("compare", *runs).err


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("checkpoint.pt", "holds an unfinished run, which has no report yet: dpm prune --resume -o begun"),
        ("a", "exist"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_folder_without_a_report_says_why(dpm: Any, command: str, file: str, said: str) -> None:
    Path("begun").mkdir()
    Path("begun", file).touch()
    ended = dpm(command, "begun")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert said in ended.err


def test_wrong_arguments_are_one_line(dpm: Any, runs: list[Path]) -> None:
    runs[0].write_bytes(b"\xff\xfe")
    for arguments in (["out/*/report.json"], [runs[0]], [runs[1], "--csv", "--json"], []):
        ended = dpm("compare", *arguments)
        assert ended.code == 2
        assert len(ended.err.splitlines()) == 1


def test_a_report_that_was_read_is_the_one_that_was_written() -> None:
    report = make_report()
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["out/half"], ["half"]),
        (["out/a", "out/b"], ["a", "b"]),
        (["x/out", "y/out"], ["x", "y"]),
        (["r18/half/run", "r18/third/run", "r50/half/run"], ["r18/half", "r18/third", "r50/half"]),
        (["a", "a/b"], ["a", "a/b"]),
        (["out", "out"], ["out", "out"]),
    ],
)
def test_runs_are_named_by_what_differs(folders: list[str], names: list[str]) -> None:
    assert name_runs([Path(folder) / "report.json" for folder in folders]) == names


# ------------------------------------------------------------------------------------------------ the README's loop


def readme_loop() -> str:
    found = re.search(r"<!-- loop -->\n```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found[1]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_the_loop_of_the_readme_runs_skips_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("bin", "models", "recipes"):
        (tmp_path / folder).mkdir()
    shim = tmp_path / "bin" / "dpm"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dpm_cli "$@"\n')
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for seed, name in enumerate(("first", "second model")):
        torch.manual_seed(seed)
        torch.save(build("digits", classes=10, shape=(1, 8, 8)).state_dict(), tmp_path / "models" / f"{name}.pt")
    values = yaml.safe_load(dump_recipe(load_recipe("digits")))
    values |= {"train": {"epochs": 1}, "finetune": {"epochs": 1}, "export": [], "decay": {"steps": 4}}
    values["prune"] |= {"rounds": 1}
    (tmp_path / "recipes" / "half.yaml").write_text(yaml.safe_dump(values))
    values["prune"]["target"] = {"macs": 0.0001}
    (tmp_path / "recipes" / "nothing.yaml").write_text(yaml.safe_dump(values))

    steps = iter(range(100))
    with pytest.raises(Interrupted):  # one of the four runs was begun before
        dpm_cli.prune(
            "models/first.pt", "recipes/half.yaml", output="out/first-half", should_stop=lambda: next(steps) == 4
        )

    def run_loop() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["sh", "-c", readme_loop()], capture_output=True, text=True, timeout=300, check=False)

    ended = run_loop()
    assert ended.returncode == 0, ended.stderr
    assert "first-half" in ended.stdout
    assert "second model-half" in ended.stdout
    assert "nothing" not in ended.stdout
    said = [line for line in ended.stderr.splitlines() if line]
    assert [line for line in said if line.startswith("out/")] == [
        "out/first-nothing: exit code 3",
        "out/second model-nothing: exit code 3",
    ]
    assert "resumed in stage train" in (tmp_path / "out" / "first-half.log").read_text()
    assert json.loads((tmp_path / "out" / "first-half.json").read_text())["target"]["met"]
    assert "cannot be met" in json.loads((tmp_path / "out" / "first-nothing.json").read_text())["error"]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*")}
    again = run_loop()
    assert (again.returncode, again.stdout) == (0, ended.stdout)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*")} == before

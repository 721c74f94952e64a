"""The command as a whole: instant help, exit codes, one line per error, clean streams."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import dpm_cli
from dpm_cli import errors
from dpm_cli.cli.app import app
from dpm_cli.cli.outcome import explain
from dpm_cli.recipe import point_to_schema, shipped_recipes

COMMANDS = (
    "demo",
    "init",
    "train",
    "prune",
    "inspect",
    "evaluate",
    "export",
    "predict",
    "benchmark",
    "compare",
    "report",
    "doctor",
    "recipes",
    "schema",
)
SHARED = {"--recipe", "--set", "--json"}
SHORTCUTS = {"--arch", "--data", "--weights", "--epochs", "--batch"}
TARGETS = {"--macs", "--params"}
OPTIONS = {
    "init": {"--data", "--arch", "--weights", "--output", "--overwrite"},
    "prune": SHARED
    | {"--output", "--device", "--seed", "--resume", "--overwrite", "--trust", "--no-lock", "--quiet"}
    | SHORTCUTS
    | TARGETS,
    "train": SHARED
    | {"--output", "--device", "--seed", "--resume", "--overwrite", "--trust", "--no-lock", "--quiet"}
    | SHORTCUTS,
    "inspect": SHARED | {"--sensitivity", "--share", "--images", "--csv", "--device", "--trust"} | SHORTCUTS | TARGETS,
    "evaluate": SHARED | {"--batch", "--runtime", "--device", "--trust"},
    "export": SHARED | {"--format", "--opset", "--output", "--arch", "--overwrite", "--trust"},
    "predict": {"--top", "--arch", "--trust", "--json"},
    "benchmark": {"--runtime", "--batch", "--threads", "--seconds", "--recipe", "--arch", "--trust", "--csv", "--json"},
    "compare": {"--csv", "--json"},
    "demo": {"--output", "--device", "--json", "--quiet"},
    "report": set(),
    "doctor": {"--json"},
    "recipes": {"--json"},
    "schema": set(),
}


def run_python(code: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=check, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["recipes"], ["--version"]])
def test_help_and_recipes_do_not_import_what_is_slow(arguments: list[str]) -> None:
    slow = (
        "torch",
        "onnx",
        "onnxruntime",
        "numpy",
        "scipy",
        "rich.table",
        "rich.progress",
        "dpm_cli.report",
        "dpm_cli.results",
    )
    code = (
        "import sys; from dpm_cli.cli.app import main\n"
        f"assert main({arguments!r}) == 0\n"
        f"print([name for name in {slow!r} if name in sys.modules], file=sys.stderr)"
    )
    assert run_python(code).stderr == "[]\n"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, dpm_cli; dpm_cli.load_recipe('digits'); dpm_cli.DpmError; print('torch' in sys.modules)"
    assert run_python(code).stdout == "False\n"


@pytest.mark.thorough
def test_python_m_is_the_same_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "dpm_cli", "prune"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")


def test_public_names_are_those_of_all_and_can_be_called() -> None:
    for name in dpm_cli.__all__:
        assert callable(getattr(dpm_cli, name)), name
    assert set(dpm_cli.__all__) <= set(dir(dpm_cli))
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        dpm_cli.prunes  # noqa: B018


def test_there_are_the_promised_commands_with_the_promised_options() -> None:
    group: Any = typer.main.get_command(app)
    assert tuple(group.commands) == COMMANDS
    for name, command in group.commands.items():
        offered = {option for each in command.params for option in each.opts if option.startswith("--")}
        assert offered - {"--help"} == OPTIONS[name], name


def test_help_lists_every_command_in_full(dpm: Any) -> None:
    ended = dpm("--help")
    assert (ended.code, ended.err) == (0, "")
    assert all(f"\n  {name} " in ended.out for name in COMMANDS)
    commands = ended.out.partition("Commands:")[2]
    assert "..." not in commands  # no description is cut off
    assert dpm() == ended


def test_version(dpm: Any) -> None:
    ended = dpm("--version")
    assert ended.code == 0
    assert ended.out.startswith("dpm ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prun"], "prune"),
        (["prune", "model.pt", "--recipe", "digits", "--sed", "1"], "--sed"),
        (["prune", "model.pt", "--recipe", "digits", "--seed", "one"], "--seed"),
        (["export", "slim.pt", "--format", "tflite"], "tflite"),
        (["--verbose"], "--verbose"),
    ],
)
def test_wrong_usage_is_one_line_with_a_hint(dpm: Any, arguments: list[str], said: str) -> None:
    ended = dpm(*arguments)
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert line.endswith("--help")


def test_wrong_usage_with_json_is_one_document(dpm: Any) -> None:
    ended = dpm("prune", "--json")
    document = json.loads(ended.out)
    assert document["exit_code"] == ended.code == 2
    assert f"error: {document['error']}\n" == ended.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.DpmError("x"), 1),
        (errors.RunError("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.ModelFileError("x"), 2),
        (errors.UnsupportedModelError("x"), 2),
        (errors.DataError("x"), 2),
        (errors.OutputError("x"), 2),
        (errors.RecipeError("x"), 2),
        (errors.TargetError("x"), 3),
        (errors.AccuracyError("x"), 4),
        (errors.Interrupted("x"), 130),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "out/slim.pt"), 1),
        (MemoryError(), 1),
    ],
)
def test_every_error_has_its_exit_code_and_one_line(error: BaseException, code: int) -> None:
    lines, found = explain(error)
    assert found == code
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def raising(error: BaseException) -> Any:
    def command(*_: object, **__: object) -> None:
        raise error

    return command


def test_every_mistake_of_a_recipe_has_its_own_line(dpm: Any) -> None:
    ended = dpm("train", "-r", "digits", "--set", "prune.roundz=3", "--set", "train.lr=fast")
    assert ended.code == 2
    assert [line[:7] for line in ended.err.splitlines()] == ["error: ", "error: "]


def test_an_error_cannot_break_the_line_or_steer_the_terminal(dpm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpm_cli, "evaluate", raising(errors.DataError("a\nb\x1b[2Jc")))
    ended = dpm("evaluate", "x.pt", "-r", "digits")
    assert ended.err == "error: a b [2Jc\n"


def test_a_bug_is_one_line_and_a_file_with_the_traceback(
    dpm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(dpm_cli, "evaluate", raising(ZeroDivisionError("oops")))
    ended = dpm("evaluate", "x.pt", "-r", "digits", "--json")
    assert ended.code == json.loads(ended.out)["exit_code"] == 1
    (line,) = ended.err.splitlines()
    assert line.startswith("internal error: ZeroDivisionError: oops; please report it, traceback in ")
    saved = Path(line.rpartition(" ")[2]).read_text(encoding="utf-8")
    assert "Traceback" in saved
    assert "in command" in saved


def test_a_bug_shows_its_traceback_on_request(dpm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(dpm_cli, "evaluate", raising(ZeroDivisionError("oops")))
    monkeypatch.setenv("DPM_DEBUG", "1")
    assert "Traceback" in dpm("evaluate", "x.pt", "-r", "digits").err


def test_out_of_memory_names_the_way_out(dpm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpm_cli, "evaluate", raising(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")))
    ended = dpm("evaluate", "x.pt", "-r", "digits")
    assert ended.code == 1
    assert "data.batch" in ended.err


def test_ctrl_c_is_one_line(dpm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpm_cli, "evaluate", raising(KeyboardInterrupt()))
    ended = dpm("evaluate", "x.pt", "-r", "digits", "--json")
    assert ended.code == 130
    assert ended.err == "error: interrupted\n"
    assert json.loads(ended.out) == {"error": "interrupted", "exit_code": 130}


def test_recipes_are_listed_with_their_first_line_and_printed(dpm: Any) -> None:
    listed = dpm("recipes")
    assert [line.split()[0] for line in listed.out.splitlines()] == list(shipped_recipes())
    first, *_ = json.loads(dpm("recipes", "--json").out)
    assert first["name"] == "cifar10"
    assert first["file"] == str(shipped_recipes()["cifar10"])
    assert first["about"] in listed.out
    assert dpm("recipes", "cifar10", "--json").code == 2
    assert all(len(line.split()) > 4 for line in listed.out.splitlines())
    for name, path in shipped_recipes().items():
        assert dpm("recipes", name).out == point_to_schema(path.read_text(encoding="utf-8"))


def test_an_unknown_shipped_recipe_names_the_nearest(dpm: Any) -> None:
    ended = dpm("recipes", "cifar11")
    assert ended.code == 2
    assert "did you mean 'cifar10'?" in ended.err


@pytest.mark.skipif(os.name == "nt", reason="no such pipes")
def test_a_closed_pipe_is_silent() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        code = "import sys; from dpm_cli.cli.app import main; sys.exit(main(['recipes', 'cifar10']))"
        ended = subprocess.run(
            [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_stream_without_unicode_spells_signs() -> None:
    code = "import sys; from dpm_cli.cli.app import main; sys.exit(main(['recipes', 'resnet56-folder']))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60, check=True)
    assert b"32x32" in ended.stdout


def test_short_help_is_help(dpm: Any) -> None:
    assert dpm("prune", "-h") == dpm("prune", "--help")


@pytest.mark.thorough
def test_the_shell_completes_commands_and_recipes() -> None:
    code = "from dpm_cli.cli.app import main; main([])"
    for words, offered in (("dpm insp", "inspect"), ("dpm prune --recipe cif", "cifar10")):
        asked = {"_DPM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        command, environment = [sys.executable, "-c", code], os.environ | asked
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        assert offered in ended.stdout.split()

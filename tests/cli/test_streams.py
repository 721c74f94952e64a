"""Streams that are closed or full, and interrupts at any moment: results are kept, one line or none is said."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from digits_recipe import recipe

import dpm_cli
from dpm_cli.cli.app import main
from dpm_cli.errors import UsageError

DPM = f"{sys.executable} -m dpm_cli"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)


def test_closed_standard_output_is_no_error() -> None:
    ended = shell(f"{DPM} recipes >&-")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.thorough
def test_closed_error_stream_does_not_keep_anything_from_running() -> None:
    ended = shell(f"{DPM} recipes 2>&-")
    assert ended.returncode == 0
    assert "digits" in ended.stdout
    ended = shell(f"{DPM} recipes absent 2>&-")
    assert (ended.returncode, ended.stdout) == (2, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_standard_output_is_one_line() -> None:
    ended = shell(f"{DPM} recipes > /dev/full")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.endswith("No space left on device\n")
    assert ended.stderr.count("\n") == 1
    assert shell(f"{DPM} recipes absent > /dev/full 2> /dev/full").returncode == 2
    ended = shell(f"{DPM} schema > /dev/full")  # more than Python keeps for later
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith("error: ")


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of address space")
def test_a_limit_that_keeps_torch_from_loading_is_lack_of_memory(tmp_path: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe()))
    ended = shell(f"ulimit -v 1000000; cd {tmp_path}; {DPM} train -r recipe.yaml -o out.pt")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: out of memory: a library cannot be loaded")
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.02, 0.1, 0.3, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_interrupt_at_any_moment_says_one_line_or_none(after: float, count: int, tmp_path: Any) -> None:
    command = [sys.executable, "-m", "dpm_cli", "demo"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    for _ in range(count):
        time.sleep(after)
        process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=120)[1]
    assert "Traceback" not in err, err
    assert "internal error" not in err, err


def test_library_that_stumbles_over_an_interrupt_is_not_blamed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half_imported(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    monkeypatch.setattr(dpm_cli, "load_recipe", half_imported)
    assert main(["inspect", "model.pt", "-r", "digits"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_runs_in_two_threads_wait_for_each_other_and_leave_no_trace(tmp_path: Any) -> None:
    torch.manual_seed(7)
    before, mkldnn, errors = torch.get_rng_state(), torch.backends.mkldnn.enabled, []

    def train(name: str) -> None:
        try:
            with torch.no_grad():
                dpm_cli.train(recipe(train={"epochs": 1}), output=tmp_path / name)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=[f"{number}.pt"]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.backends.mkldnn.enabled == mkldnn
    one, two = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_recipe_of_no_kind_is_an_error_of_ours() -> None:
    nothing: Any = None
    with pytest.raises(UsageError, match="the recipe is a NoneType"):
        dpm_cli.train(nothing)

"""The one command for a GPU: rehearsed on the CPU, killed at its limits, asking benchmarks only for what they know."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
GRANDCHILD = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def rehearse(out: Path, *options: str) -> dict[str, Any]:
    """Run the command as on a GPU, but small; return its summary."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--out", str(out), *options]
    ended = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True)
    logs = out / "logs.txt"
    assert ended.returncode == 0, ended.stdout + ended.stderr + (logs.read_text()[-4000:] if logs.exists() else "")
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def test_rehearsal_measures_and_keeps_three_files(tmp_path: Path) -> None:
    summary = rehearse(tmp_path, "--parts", "images", "step", "throughput")
    assert [part["part"] for part in summary["parts"]] == ["images", "step", "throughput"]
    assert summary["results"]["step-cpu"]["rows"][0]["units"] > 0
    assert {row["loop"] for row in summary["results"]["throughput-cpu"]["rows"]} >= {"plain", "dpm"}
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "logs.txt", "kept.tar.gz"}
    with tarfile.open(tmp_path / "kept.tar.gz") as kept:
        assert "results/step-cpu.json" in kept.getnames()


@pytest.mark.thorough
def test_whole_rehearsal(tmp_path: Path, gpu: Any) -> None:
    summary = rehearse(tmp_path)
    assert [part["part"] for part in summary["parts"]] == list(gpu.PARTS)
    names = "latency-squeezenet1_1 memory-cpu penalty-cpu profile-cpu step-cpu throughput-cpu throughput-cpu-compiled"
    assert {*names.split(), "paired_rehearsal", "paired_rehearsal-vit"} <= summary["results"].keys()


@pytest.mark.parametrize("rehearses", [False, True])
def test_every_part_asks_for_programs_and_options_that_exist(gpu: Any, tmp_path: Path, rehearses: bool) -> None:
    place = importlib.import_module("gpu_parts").Place(tmp_path, tmp_path / "kit", rehearses)
    for part in gpu.PARTS.values():
        for job in part.jobs(place, part.seconds):
            script = BENCHMARKS / job.program
            if script.suffix != ".py":
                assert importlib.util.find_spec(job.program)
                continue
            text = script.read_text(encoding="utf-8")
            asked = [word for word in job.arguments if str(word).startswith("--")]
            assert [option for option in asked if f'"{option}"' not in text] == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_late_job_is_killed_with_its_descendants_and_the_next_part_runs(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    parts = importlib.import_module("gpu_parts")
    (tmp_path / "sleeps.py").write_text(GRANDCHILD)
    (tmp_path / "fails.py").write_text("import sys; print('why'); sys.exit(3)")
    place = parts.Place(tmp_path / "work", None, False)
    place.make()
    late = parts.Part("late", 3.0, lambda *_: [parts.Job("sleeps", str(tmp_path / "sleeps.py"))], least=0)
    failing = parts.Part("failing", 20.0, lambda *_: [parts.Job("fails", str(tmp_path / "fails.py"))], least=0)
    greedy = parts.Part("greedy", 900.0, lambda *_: [], least=800.0)
    runner = gpu.Runner(tmp_path, place, budget=60.0)
    runner.run([late, failing, greedy])
    first, second, third = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert first["jobs"][0]["killed"]
    assert first["seconds"] < 20
    assert (second["jobs"][0]["exit_code"], second["jobs"][0]["tail"][-1]) == (3, "why")
    assert third["skipped"]
    grandchild = int(first["jobs"][0]["tail"][-1])
    deadline = time.monotonic() + 5
    while is_running(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(grandchild)


def is_running(process: int) -> bool:
    """Tell whether a process exists and is no zombie that waits for its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_kit_wants_only_packages_of_the_constraints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    kit = importlib.import_module("gpu_kit")
    versions = kit.read_versions((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert {kit.normalise(name) for name in kit.LACKING} <= versions.keys()

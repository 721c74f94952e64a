"""What README.md promises of several processes: the same command with as many gives the same bits, and its target."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "processes.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_as_many_processes_give_the_same_bits_again(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BENCHMARK_RESULTS": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--work", str(tmp_path), "--nets", "digits", "--seeds", "1"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads((tmp_path / "processes.json").read_text())["rows"]
    assert len(rows) == 3 * 2
    assert all(row["same bits again"] is row["targets met"] is True for row in rows)
    assert all(row["loss of epoch 1 differs by"] < 1e-3 for row in rows)  # they train on the same images

"""A dozen models of the zoo, each day others: cut, compared, trained, saved and exported, each in its own process."""

import os
import random
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

ZOO = Path(__file__).parents[2] / "benchmarks" / "zoo.py"


@pytest.mark.slow
@pytest.mark.skipif(not ZOO.exists(), reason="needs the repository's benchmarks")
def test_a_random_dozen_of_the_zoo_is_cut_exactly(tmp_path: Path) -> None:
    """DPM_ZOO_SEED=N draws the dozen of an earlier run again."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    today = random.Random(datetime.now(UTC).date().toordinal()).randrange(2**31)
    seed = os.environ.get("DPM_ZOO_SEED", str(today))
    exports = [f"--export={kind}" for kind in ("slim", "onnx", "torchscript")]
    command = [sys.executable, ZOO, "--random", "12", "--seed", seed, "--rows", tmp_path / "zoo.jsonl", *exports]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"DPM_ZOO_SEED={seed}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.startswith(f"seed {seed}\n")

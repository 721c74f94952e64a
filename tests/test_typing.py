"""The public names, seen by the type checker of a user."""

import subprocess
import sys
from pathlib import Path

import pytest

import dpm_cli

# Not shared with the project's own runs, whose other options would make both start from nothing each time.
CACHE = Path(__file__).resolve().parents[1] / ".mypy_cache" / "script"

# One use of every public name, with arguments of every documented type. A new name gets a line here.
SCRIPT = """
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dpm_cli
from dpm_cli import DpmError, Recipe, Report
from dpm_cli.events import Event
from dpm_cli.results import Evaluated, Inspected, Trained

recipe: Recipe = dpm_cli.load_recipe("cifar10", ["prune.target.macs=0.5"])
drafted: Recipe = dpm_cli.init("photos", arch="torchvision:resnet18", output=Path("mine.yaml"))
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
values: dict[str, Any] = {"prune": {"target": {"macs": 0.5}}}

try:
    trained: Trained = dpm_cli.train(recipe, output=Path("model.pt"), model="first.pt", device="cpu", resume=True)
    report: Report = dpm_cli.prune(network, values, output="out", resume=True, should_stop=lambda: 0)
    report = dpm_cli.prune(Path("model.pt"), "cifar10", on_event=print)
except DpmError as error:
    code: int = error.exit_code
plan: Inspected = dpm_cli.inspect("model.pt", Path("recipe.yaml"), sensitivity=0.5)
slim: nn.Module = dpm_cli.load("out/slim.pt")
slim = dpm_cli.load(Path("out/slim.pt"), model=network)
measured: Evaluated = dpm_cli.evaluate("out/slim.pt", recipe, latency=False)
largest: float = max(made.max_difference for made in dpm_cli.export_slim("out/slim.pt", formats=["onnx"]))

reread: Report = Report.from_json(report.to_json())
faster: float = reread.dense.latency["torch"].median / reread.slim.latency["torch"].median
is_met: bool = reread.target.is_met
layers: list[str] = [width.layer for width in reread.widths]
target: float | None = recipe.prune.target.macs

told: list[Event] = []
pruner = dpm_cli.Pruner(
    network, torch.zeros(2, 1, 8, 8), target={"macs": 0.5}, steps=9, base="otov2", on_event=told.append, seed=1
)
optimizer = torch.optim.SGD(network.parameters(), 0.1)
pruner.before_step()
pruner.after_step(optimizer)
state: dict[str, Any] = pruner.state_dict()
pruner.load_state_dict(state)
left: int = pruner.cost()
pruner.finish()
dpm_cli.save(network, "slim.pt", arch="digits", mean=[0.5], std=(0.5,), names=list("0123456789"))

about = dpm_cli.read_metadata("slim.pt")
logits: torch.Tensor = slim(dpm_cli.prepare("photo.jpg", about)[None])
fastest: float = min(row.median for row in dpm_cli.benchmark(["model.onnx"], batches=[1, 8]))
best: str = dpm_cli.predict("model.onnx", ["photo.jpg", Path("other.jpg")], top=2)[0].classes[0].name
"""


def check_types(script: str, folder: Path) -> str:
    """What `mypy --strict` says about a script that lies somewhere else."""
    path = folder / "script.py"
    path.write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={CACHE}"]
    ended = subprocess.run(
        [*command, "--hide-error-context", "--no-pretty", str(path)],
        cwd=folder, timeout=300, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode in (0, 1), ended.stderr
    return ended.stdout


def test_script_uses_every_public_name() -> None:
    assert [name for name in dpm_cli.__all__ if name not in SCRIPT] == []


@pytest.mark.slow  # 20 s without a cache: most of it for torch
def test_script_of_a_user_is_typed(tmp_path: Path) -> None:
    assert "Success: no issues found" in check_types(SCRIPT, tmp_path)


@pytest.mark.slow
def test_wrong_arguments_are_found_by_the_type_checker(tmp_path: Path) -> None:
    said = check_types("import dpm_cli\n\ndpm_cli.prune(3, 'cifar10')\ndpm_cli.load('slim.pt').no()\n", tmp_path)
    assert 'Argument 1 to "prune" has incompatible type "int"' in said

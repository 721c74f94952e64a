"""Every hostile file of `test_hostile`, by the command that would read it, in a process whose memory and time count."""

from pathlib import Path

import pytest
import torch
from attack import Answer, Attacker, assert_held
from test_hostile import MODELS, RECIPES, SLIMS

pytestmark = pytest.mark.slow


def run(attacker: Attacker, folder: Path, path: Path, *arguments: object) -> Answer:
    answer = attacker.run(*arguments, folder=folder)
    assert_held(answer, path.stat().st_size, folder)
    return answer


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_read_within_bounds(attacker: Attacker, originals: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(RECIPES[name])
    run(attacker, tmp_path, path, "inspect", originals / "model.pt", "-r", path)  # some would only fail in training


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".onnx", ".ts"])
@pytest.mark.parametrize("name", MODELS)
def test_model_is_refused_within_bounds(
    attacker: Attacker, originals: Path, tmp_path: Path, name: str, suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(MODELS[name]())
    assert run(attacker, tmp_path, path, "evaluate", path, "-r", originals / "recipe.yaml").code == 2


@pytest.mark.parametrize("name", SLIMS)
def test_slim_file_is_refused_within_bounds(attacker: Attacker, originals: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "slim.pt"
    torch.save(torch.load(originals / "slim.pt", weights_only=True) | SLIMS[name], path)
    assert run(attacker, tmp_path, path, "export", path, "--format", "torchscript", "-o", "there").code == 2


@pytest.mark.parametrize("name", MODELS)
def test_folder_with_such_a_file_is_examined_within_bounds(attacker: Attacker, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for file in ("slim.pt", "checkpoint.pt", "report.json"):
        (out / file).write_bytes(MODELS[name]())
    assert run(attacker, tmp_path, out / "slim.pt", "doctor", "out").code == 2

"""One trust line: what can run code runs only with `--trust` (`trust=True`), or if the user typed its name."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from digits_recipe import recipe

import dpm_cli
from dpm_cli.cli.app import main
from dpm_cli.errors import RecipeError
from dpm_cli.layers.images import Framing
from dpm_cli.models import Metadata, build, save_slim
from dpm_cli.recipe import dump_recipe, hash_recipe, load_recipe, parse_recipe

JOBS = {
    "prune": lambda recipe, **more: dpm_cli.prune("model.pt", recipe, **more),
    "inspect": lambda recipe, **more: dpm_cli.inspect("model.pt", recipe, **more),
    "evaluate": lambda recipe, **more: dpm_cli.evaluate("model.pt", recipe, latency=False, **more),
    "train": lambda recipe, **more: dpm_cli.train(recipe, output="trained.pt", **more),
}
NETS = """
import os
os.mkdir("imported")
from dpm_cli.models import build

def Net(classes):
    return build("digits", classes=classes, shape=(1, 8, 8))
"""


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of code in the current folder, beside a recipe that names it and weights that fit."""
    monkeypatch.chdir(tmp_path)
    module = f"nets_{tmp_path.name.replace('-', '_')}"  # never imported before
    (tmp_path / f"{module}.py").write_text(NETS)
    values = recipe(model={"arch": f"{module}:Net", "classes": 10, "input": [1, 8, 8]}, train={"epochs": 0})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    torch.save(build("digits", classes=10, shape=(1, 8, 8)).state_dict(), "model.pt")
    return f"{module}:Net"


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("as_file", [True, False])
def test_code_that_a_recipe_names_is_not_imported(named: str, job: str, as_file: bool) -> None:
    given: Any = "recipe.yaml" if as_file else yaml.safe_load(Path("recipe.yaml").read_text())
    with pytest.raises(RecipeError, match=rf"model\.arch: {named}\): --trust .in Python trust=True.") as error:
        JOBS[job](given)
    assert f"--set model.arch={named}" in str(error.value)
    assert not Path("imported").exists()


@pytest.mark.parametrize("arch", ["click:edit", "pip._internal:main", "os:abort", "posixpath:os"])
def test_nothing_of_any_library_runs_either(named: str, arch: str) -> None:
    with pytest.raises(RecipeError, match="names code"):
        dpm_cli.train(recipe(model={"arch": arch, "classes": 10, "input": [1, 8, 8]}))


def test_trusted_code_runs(named: str) -> None:
    assert dpm_cli.inspect("model.pt", "recipe.yaml", trust=True).code == {"model.arch": named}
    assert Path("imported").exists()


@pytest.mark.thorough
def test_typing_the_name_is_consent_for_that_name_alone(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "model.pt", "-r", "recipe.yaml"]) == 2
    assert main(["inspect", "model.pt", "-r", "recipe.yaml", "--set", "prune.rounds=2"]) == 2
    assert not Path("imported").exists()
    assert main(["inspect", "model.pt", "-r", "recipe.yaml", "--set", f"model.arch={named}"]) == 0
    assert f"model.arch: {named}, which this recipe runs" in " ".join(capsys.readouterr().out.split())


def test_consent_is_not_a_setting(named: str) -> None:
    typed = load_recipe("recipe.yaml", [f"model.arch={named}"])
    assert (typed.code_to_trust, typed.code) == ({}, {"model.arch": named})
    assert hash_recipe(typed) == hash_recipe(load_recipe("recipe.yaml"))
    again = parse_recipe(yaml.safe_load(dump_recipe(typed)))
    assert again.code_to_trust == {"model.arch": named}  # recipe.yaml of a run asks again
    assert parse_recipe(recipe()).code == {}


def test_list_of_recipes_says_which_need_trust(
    named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dpm_cli.recipe.shipped_recipes", lambda: {"mine": Path("recipe.yaml")})
    assert main(["recipes"]) == 0
    assert "needs --trust" in capsys.readouterr().out


def test_code_that_gives_data_needs_trust_too(named: str) -> None:
    module, _, _ = named.partition(":")
    values = recipe(data={"name": f"{module}:images"})
    with pytest.raises(RecipeError, match=rf"data\.name: {module}:images\): --trust"):
        dpm_cli.train(values)
    assert not Path("imported").exists()
    assert parse_recipe(recipe(data={"name": "hf:user/photos"})).code == {}


def test_data_code_in_the_recipe_of_a_slim_file_is_not_imported(named: str, tmp_path: Path) -> None:
    """`dpm export --format onnx-int8` loads the data of the recipe that the file holds."""
    settings = recipe(data={"name": named})
    module = dpm_cli.models.build("digits", classes=10, shape=(1, 8, 8)).eval()
    metadata = Metadata(10, Framing((1, 8, 8)), mean=(0.0,), std=(1.0,), arch="digits")
    save_slim(tmp_path / "slim.pt", module, metadata=metadata, recipe=dump_recipe(parse_recipe(settings)), report={})
    with pytest.raises(RecipeError, match="names code"):
        dpm_cli.export_slim("slim.pt", formats=["onnx-int8"], output="there")
    assert not Path("imported").exists()

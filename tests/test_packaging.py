"""What a user installs: the wheel holds the recipes, and they are found by name however dpm is installed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
FIND = """
import pathlib, sys
import dpm_cli
from dpm_cli.recipe import load_recipe, shipped_recipes
assert pathlib.Path(dpm_cli.__file__).is_relative_to(sys.argv[1]), dpm_cli.__file__
assert all(path.is_relative_to(sys.argv[1]) for path in shipped_recipes().values())
load_recipe("cifar10"), load_recipe("cifar10.yaml")
print(*shipped_recipes())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=60, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def find_recipes(package: Path, *, cwd: Path, pythonpath: Path | None) -> set[str]:
    """Names of the recipes that a new process finds with the dpm_cli that lies under `package`."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(pythonpath)} if pythonpath else {}
    command = [sys.executable, "-W", "error", "-c", FIND, str(package)]
    ended = subprocess.run(command, cwd=cwd, env=environment, check=True, timeout=60, stdout=subprocess.PIPE, text=True)
    return set(ended.stdout.split())


def test_recipes_are_found_in_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    assert find_recipes(tmp_path / "site", cwd=tmp_path / "empty", pythonpath=tmp_path / "site") == RECIPES


def test_recipes_are_found_in_an_editable_install_from_any_folder(tmp_path: Path) -> None:
    assert find_recipes(ROOT, cwd=tmp_path, pythonpath=ROOT) == RECIPES


def test_recipes_are_found_in_a_checkout() -> None:
    assert find_recipes(ROOT, cwd=ROOT, pythonpath=None) == RECIPES


def test_wheel_holds_the_whole_package_with_its_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = (path for path in (ROOT / "dpm_cli").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {str(path.relative_to(ROOT)) for path in package} | {f"dpm_cli/recipes/{name}.yaml" for name in RECIPES}
    expected.add("dpm_cli/recipes/schema.json")
    assert names == expected
    assert "dpm_cli/py.typed" in names

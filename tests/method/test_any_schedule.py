"""Any number of images, epochs, base and batch: a run begins by itself, or is told values with which it does."""

import random
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import dpm_cli
from dpm_cli.data.load import hold_out
from dpm_cli.errors import RecipeError
from dpm_cli.method.schedule import plan_schedule
from dpm_cli.models import build
from dpm_cli.recipe import load_recipe, parse_recipe, shipped_recipes
from dpm_cli.recipe.schema import Recipe

BASES = ("depgraph", "otov2", "gate-decorator", "taylor", "hesso", "gates by fraction")
MORE = {
    "taylor": ["prune.base=depgraph", "prune.importance=taylor"],
    "hesso": ["prune.base=otov2", "prune.otov2.variant=hesso"],
    "gates by fraction": ["prune.base=gate-decorator", "prune.gates.fraction=0.2"],
}
SMALLEST: dict[str, Any] = {"model": {"arch": "digits"}, "data": {"name": "digits"}, "prune": {"target": {"macs": 0.5}}}


def draw(seed: int) -> tuple[int, list[str]]:
    """A number of training images, and settings: many are left to `auto`, some are numbers that may not fit."""
    drawn = random.Random(seed)
    base = drawn.choice(BASES)
    settings = MORE.get(base, [f"prune.base={base}"])
    settings = [
        *settings,
        f"train.epochs={drawn.randint(1, 5)}",
        f"data.batch={drawn.choice((8, 16, 32, 64, 128, 256))}",
    ]
    for name, values in (
        ("decay.steps", (1, 5, 50, 200)),
        ("prune.rounds", (1, 3, 10)),
        ("prune.end", (0.3, 0.8, 1.0)),
        ("decay.rectify", ("true", "false")),
    ):
        if drawn.random() < 0.3:
            settings.append(f"{name}={drawn.choice(values)}")
    return round(50 * 100 ** drawn.random()), settings


def plan(recipe: Recipe, images: int) -> None:
    """Plan the schedule as a run does. images: to train on, before any are held out."""
    left, _ = hold_out(images, recipe.data.validation, recipe.seed)
    plan_schedule(recipe.prune, recipe.train, recipe.decay, steps_per_epoch=max(1, len(left) // recipe.data.batch))


def find_ways_out(message: str) -> list[list[str]]:
    """The settings that a refusal names: a list of ways out, each a list of overrides."""
    _, _, named = message.partition(": set ")
    ways = [re.findall(r"([a-z_.]+): ([\w.]+)", way) for way in named.split(", or ")]
    return [[f"{key}={value}" for key, value in way] for way in ways if way]


@pytest.mark.parametrize("seed", range(200))
def test_a_run_fits_by_itself_or_by_the_values_that_its_refusal_names(seed: int) -> None:
    images, settings = draw(seed)
    try:
        plan(parse_recipe(SMALLEST, settings), images)
        return
    except RecipeError as error:
        message = str(error)
    ways = find_ways_out(message)
    assert ways, message
    for way in ways:
        plan(parse_recipe(SMALLEST, [*settings, *way]), images)


@pytest.mark.parametrize("base", BASES[:4])
@pytest.mark.parametrize("images", [300, 500, 900])
def test_one_epoch_of_a_few_hundred_images_fits_without_any_number(base: str, images: int) -> None:
    batch = 32 if base == "otov2" else 128  # it needs three steps: one to look, one to mark, one for what is missing
    settings = [*MORE.get(base, [f"prune.base={base}"]), "train.epochs=1", f"data.batch={batch}"]
    plan(parse_recipe(SMALLEST, settings), images)


@pytest.mark.parametrize("images", [54, 200, 1800, 50_000])
@pytest.mark.parametrize("change", ["seed=0", "train.epochs=1"])
def test_the_three_lines_of_the_readme_fit_any_folder(images: int, change: str) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert block
    values = yaml.safe_load(textwrap.dedent(block[1]))
    assert list(values) == ["model", "data", "prune"]
    plan(parse_recipe(values, [change]), images)


# ------------------------------------------------------------------------------------------------------------- whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in three classes: 66 to train on and 12 to test on."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 22), ("test", 4)):
        for place, name in enumerate("abc"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 90, (8, 8, 3))
                pixels[..., place] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return build("digits", classes=3, shape=(3, 8, 8)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, 200, 17))
def test_whole_runs_end_at_their_target(
    seed: int, folder: Path, dense: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPM_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    _, settings = draw(seed)
    values = {
        "model": {"arch": "digits", "classes": 3, "input": [3, 8, 8]},
        "data": {"name": "folder", "root": str(folder), "augment": {"crop": 1}},
        "prune": {"target": {"macs": 0.5}},
        "finetune": {"epochs": 1},
        "export": [],
    }

    def go(*more: str) -> None:
        recipe = parse_recipe(values, [*settings, *more])
        plan = dpm_cli.inspect(dense, recipe)
        if plan.problems:
            raise RecipeError(list(plan.problems))
        report = dpm_cli.prune(dense, recipe, output=tmp_path / f"out-{len(more)}-{''.join(more)}")
        assert report.target.is_met

    try:
        go()
    except RecipeError as error:
        way = find_ways_out(str(error))[0]
        go(*way)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name != "on-the-fly"])
@pytest.mark.parametrize("change", ["data.limit=60", "train.epochs=2"])
def test_shipped_recipes_begin_on_few_images(
    name: str, change: str, folder: Path, dense: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a small net and its images; test_fitted_schedule.py plans for as many images as the recipes name."""
    monkeypatch.setenv("DPM_CACHE", str(tmp_path / "cache"))
    small = [f"data={{name: folder, root: {folder}, batch: 1}}", "model={arch: digits, classes: 3, input: [3, 8, 8]}"]
    recipe = load_recipe(name, [*small, change])
    assert dpm_cli.inspect(dense, recipe).problems == ()

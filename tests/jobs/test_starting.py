"""What a job starts from: a module, a file, published weights by name, or those that the recipe names."""

from pathlib import Path

import pytest
import torch
from digits_recipe import recipe

import dpm_cli
from dpm_cli.errors import RecipeError, UsageError
from dpm_cli.events import Note
from dpm_cli.jobs.starting import load_start, name_published
from dpm_cli.models import build
from dpm_cli.recipe import parse_recipe


@pytest.fixture
def five(tmp_path: Path) -> Path:
    """Weights of the digits net that know five classes."""
    torch.manual_seed(3)
    path = tmp_path / "five.pt"
    torch.save(build("digits", classes=5, shape=(1, 8, 8)).state_dict(), path)
    return path


def test_training_starts_from_the_weights_that_the_recipe_names(five: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    values = recipe(model={"weights": str(five)}, dense={"epochs": 1}, data={"limit": 100})
    dpm_cli.train(
        values,
        output=tmp_path / "model.pt",
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert any(note.startswith(f"{five} knows 5 classes, model.classes is 10: the head") for note in notes)


def test_pruning_may_start_from_them_too(five: Path) -> None:
    start = load_start(None, parse_recipe(recipe(model={"weights": str(five)})), trust=False)
    assert start.arch == "digits"
    assert "is new and untrained" in start.notes[0]
    dpm_cli.inspect(None, recipe(model={"weights": str(five)}))


def test_a_file_that_is_named_comes_before_the_recipes_weights(five: Path, tmp_path: Path) -> None:
    module = build("digits", classes=10, shape=(1, 8, 8))
    torch.save(module.state_dict(), tmp_path / "ten.pt")
    start = load_start(tmp_path / "ten.pt", parse_recipe(recipe(model={"weights": str(five)})), trust=False)
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in start.module.state_dict().items())
    assert start.notes == ()


def test_without_any_model_the_ways_to_name_one_are_told() -> None:
    with pytest.raises(UsageError, match=r"no model is given: name a file, or torchvision:NAME, or set model\.weights"):
        dpm_cli.inspect(None, recipe())


def test_published_model_of_another_architecture_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"the model is torchvision:resnet18, but model\.arch is digits: make them"):
        dpm_cli.inspect("torchvision:resnet18", recipe())


def test_names_of_published_models_hold_their_tag() -> None:
    assert name_published("torchvision:resnet18") == ("torchvision:resnet18", "torchvision:DEFAULT")
    assert name_published("timm:resnet18.a1_in1k") == ("timm:resnet18", "timm:a1_in1k")
    assert name_published("model.pt") is None


def test_module_with_negative_variances_is_refused() -> None:
    module = build("digits", classes=10, shape=(1, 8, 8))
    module.bn1.running_var[3] = -1.0
    with pytest.raises(UsageError, match=r"variances below zero in bn1\.running_var"):
        load_start(module, parse_recipe(recipe()), trust=False)


def test_learning_rate_that_no_net_survives_is_refused() -> None:
    """100 ended with exit code 0 and a net at chance."""
    with pytest.raises(RecipeError, match=r"train\.lr.*10"):
        parse_recipe(recipe(train={"lr": 100}))


def test_training_that_ends_at_chance_says_so(tmp_path: Path) -> None:
    notes: list[str] = []
    dpm_cli.train(
        recipe(train={"epochs": 1, "lr": 9.0}, data={"limit": 64}),
        output=tmp_path / "model.pt",
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert any(note.startswith("the model guesses: ") and "lower lr (9)" in note for note in notes)

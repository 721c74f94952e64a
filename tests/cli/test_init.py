"""`dpm init`, and the options that stand in for a recipe."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dpm_cli
from dpm_cli.cli.app import main


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sixty photos of odd sizes in three classes that their colours tell apart, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPM_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for place, name in enumerate(("cat", "dog", "fish")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 90, (*rng.integers(33, 47, 2), 3))
            pixels[..., place] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{number}.jpg")
    return "photos"


def test_init_writes_a_recipe_and_names_the_next_lines(photos: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--data", photos, "--arch", "torchvision:resnet18", "-o", "mine.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "mine.yaml: torchvision:resnet18, 3 classes, input 3×32×32" in printed
    assert "dpm prune torchvision:resnet18 -r mine.yaml -o out" in printed
    assert dpm_cli.load_recipe("mine.yaml").model.classes == 3


def test_init_names_lines_that_can_be_pasted(photos: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--data", photos, "-o", "my photos.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    pasted = [shlex.split(line) for line in lines if line.startswith("  ")]
    assert pasted == [
        ["dpm", "train", "-r", "my photos.yaml", "-o", "model.pt"],
        ["dpm", "prune", "model.pt", "-r", "my photos.yaml", "-o", "out"],
    ]


def test_a_recipe_names_itself_as_a_shell_reads_it(photos: str) -> None:
    dpm_cli.init(photos, output="my photos.yaml")
    assert "dpm train --recipe 'my photos.yaml' -o model.pt" in Path("my photos.yaml").read_text()


def test_init_without_images_asks_for_them(photos: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 2
    assert "error: which images? --data FOLDER" in capsys.readouterr().err
    assert not Path("mine.yaml").exists()


def test_prune_and_inspect_without_settings_say_what_is_missing(
    photos: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "model.pt"]) == 2
    assert "error: no settings are given: name a --recipe, or --data (and --arch)" in capsys.readouterr().err
    assert main(["inspect", "model.pt", "--data", photos]) == 2
    assert "error: which architecture has model.pt? --arch names it" in capsys.readouterr().err


@pytest.mark.slow
def test_four_lines_lead_from_photos_to_an_answer(photos: str, capsys: pytest.CaptureFixture[str]) -> None:
    new = Image.fromarray(np.full((70, 51, 3), (60, 200, 60), np.uint8))
    new.save("new.jpg")  # green, as the dogs are
    assert main(["init", "--data", photos, "--arch", "torchvision:resnet18"]) == 0
    assert main(["train", "-r", "mine.yaml", "-o", "model.pt", "-q"]) == 0
    assert main(["prune", "model.pt", "-r", "mine.yaml", "-o", "out", "-q"]) == 0
    capsys.readouterr()
    assert main(["predict", "out/model.onnx", "new.jpg"]) == 0
    first = capsys.readouterr().out
    assert "dog" in first
    assert first.index("dog") < min(first.find(name) % 10**6 for name in ("cat", "fish"))  # absent: -1 % 10**6 is last


@pytest.mark.slow
def test_options_alone_prune_and_are_written_down(photos: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", photos, "--epochs", "1", "--batch", "16"]
    assert main(["train", *options, "--arch", "torchvision:resnet18", "-o", "model.pt", "-q"]) == 0
    options += ["--arch", "torchvision:resnet18", "--macs", "0.6"]
    assert main(["prune", "model.pt", *options, "-o", "out", "-q", "--set", "export=[]"]) == 0
    recipe = dpm_cli.load_recipe("out/recipe.yaml")
    assert (recipe.prune.target.macs, recipe.data.batch, recipe.train.epochs) == (0.6, 16, 1)
    assert main(["prune", "model.pt", *options, "-o", "out", "-q", "--set", "export=[]", "--resume", "--json"]) == 0


@pytest.mark.slow
def test_python_does_the_same(photos: str) -> None:
    recipe = dpm_cli.init(photos, arch="torchvision:resnet18")
    dpm_cli.train(recipe, output="model.pt")
    report = dpm_cli.prune("model.pt", recipe, output="out")
    assert report.target.is_met
    (answer,) = dpm_cli.predict("out/model.onnx", ["photos/fish/3.jpg"])
    assert answer.classes[0].name == "fish"

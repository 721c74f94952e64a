"""Recipes that are made by a look at the images: by `dpm init`, or on the spot from options."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dpm_cli
from dpm_cli.data.look import look_at
from dpm_cli.errors import DataError, ModelFileError, OutputError, RecipeError, UsageError
from dpm_cli.jobs.draft import Machine, choose_batch, choose_epochs, draft_recipe
from dpm_cli.jobs.shortcuts import Shortcuts, settle
from dpm_cli.layers.images import Framing
from dpm_cli.models import Metadata, build, save_slim
from dpm_cli.recipe.reader import read_recipe

LAPTOP = Machine(memory=8 << 30, has_gpu=False, cores=2)
SERVER = Machine(memory=80 << 30, has_gpu=True, cores=16)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sixty photos of odd sizes in three classes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "fish"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(20):
            size = (int(rng.integers(90, 110)), int(rng.integers(120, 140)), 3)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.jpg")
    return "photos"


def test_a_look_finds_classes_counts_and_sizes(photos: str) -> None:
    look = look_at(photos)
    assert (look.classes, look.counts, look.images) == (("cat", "dog", "fish"), (20, 20, 20), 54)
    assert look.channels == 3
    assert 90 <= look.height < 110 < look.width < 140


def test_a_drafted_recipe_fits_images_and_machine(photos: str) -> None:
    recipe = dpm_cli.init(photos)
    assert (recipe.model.arch, recipe.model.classes) == ("torchvision:resnet18", 3)
    assert recipe.model.input == (3, 96, 96)
    assert (recipe.data.name, str(recipe.data.root), recipe.data.batch) == ("folder", "photos", 8)
    assert recipe.prune.target.macs == 0.5
    assert recipe.prune.rounds == recipe.decay.steps == "auto"


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        ("resnet20", (3, 96, 96)),
        ("torchvision:vit_b_16", (3, 224, 224)),
        ("torchvision:inception_v3", (3, 96, 96)),
        ("my.nets:Net", (3, 96, 96)),
    ],
)
def test_the_input_suits_the_architecture(photos: str, arch: str, shape: tuple[int, int, int]) -> None:
    recipe = read_recipe(draft_recipe(photos, arch=arch, machine=LAPTOP))
    assert (recipe.model.arch, recipe.model.input) == (arch, shape)


def test_batch_and_epochs_fit(photos: str) -> None:
    look = look_at(photos)
    assert choose_batch(look, (3, 224, 224), SERVER) == 8  # few images
    many = look_at("cifar10")
    assert choose_batch(many, (3, 32, 32), LAPTOP) == 128
    assert choose_batch(many, (3, 224, 224), SERVER) == 64
    assert choose_batch(many, (3, 224, 224), LAPTOP) == 32  # 120 MB an image
    assert (choose_epochs(look, (3, 96, 96), LAPTOP), choose_epochs(look, (3, 96, 96), SERVER)) == (10, 20)
    assert choose_epochs(many, (3, 224, 224), LAPTOP) == 2


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100", "fashion-mnist"])
def test_known_datasets_are_drafted_too(name: str) -> None:
    recipe = dpm_cli.init(name)
    assert recipe.data.name == name


def test_grey_images_and_tables_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        Image.fromarray(np.full((30, 30), number, np.uint8)).save(tmp_path / f"{number}.png")
    Path("all.csv").write_text("".join(f"{number}.png,{'ab'[number % 2]}\n" for number in range(8)))
    recipe = dpm_cli.init("all.csv")
    assert (recipe.data.name, recipe.model.arch, recipe.model.classes) == ("csv", "resnet20", 2)
    assert recipe.model.input == (1, 32, 32)


def test_the_file_is_commented_and_not_overwritten(photos: str) -> None:
    recipe = dpm_cli.init(photos, output="mine.yaml")
    text = Path("mine.yaml").read_text()
    assert recipe.model == dpm_cli.init(photos).model
    assert "# Classes:   cat (20), dog (20), fish (20)\n" in text
    assert "#            dpm prune model.pt --recipe mine.yaml -o out\n" in text
    assert "yaml-language-server" in text
    with pytest.raises(OutputError, match=r"mine\.yaml exists: choose another --output, or --overwrite"):
        dpm_cli.init(photos, output="mine.yaml")
    dpm_cli.init(photos, output="mine.yaml", overwrite=True)


def test_names_of_classes_cannot_break_the_file(photos: str) -> None:
    (Path(photos) / "cat").rename(Path(photos) / "c\nseed: 9 #")
    assert dpm_cli.init(photos).seed == 0


def test_a_class_whose_name_is_no_text_is_drafted(photos: str) -> None:
    (Path(photos) / "cat").rename(Path(photos) / os.fsdecode(b"h\xfcnd"))
    assert "h\N{REPLACEMENT CHARACTER}nd (20)" in draft_recipe(photos)


def test_a_folder_whose_name_is_no_text_is_named_with_the_way_out(photos: str) -> None:
    with pytest.raises(DataError, match=r"the name b'h\\xfcnd', which is not text here: set PYTHONUTF8=1"):
        draft_recipe(os.fsdecode(b"h\xfcnd"))


@pytest.mark.parametrize(
    ("data", "arch", "error", "message"),
    [
        ("nowhere", None, DataError, "nowhere is no folder, no CSV or JSON lines file and no known dataset"),
        ("photos/cat", None, DataError, "has no class folders"),
        ("photos", "torchvision:resnet81", RecipeError, "did you mean 'torchvision:resnet18'"),
        ("one", None, DataError, "one has one class .a.; at least two are needed"),
        ("damaged", None, DataError, "none of the images of damaged can be read"),
    ],
)
def test_what_cannot_be_drafted_is_one_line(
    photos: str, data: str, arch: str | None, error: type[Exception], message: str
) -> None:
    for path in ("one/a", "damaged/a", "damaged/b"):
        Path(path).mkdir(parents=True)
        for number in range(2):
            (Path(path) / f"{number}.jpg").write_text("no image")
    with pytest.raises(error, match=message):
        dpm_cli.init(data, arch=arch)


# ----------------------------------------------------------------------------------------------------------- options


def test_options_alone_make_a_recipe(photos: str) -> None:
    shortcuts = Shortcuts("torchvision:resnet18", photos, None, "0.3", None, 3, 4)
    recipe = settle(None, ["seed=5"], shortcuts, model="model.pt")
    assert (recipe.model.arch, recipe.model.classes, recipe.prune.target.macs) == ("torchvision:resnet18", 3, 0.3)
    assert [recipe.train.epochs, recipe.finetune.epochs, recipe.dense and recipe.dense.epochs] == [3, 3, 3]
    assert (recipe.data.batch, recipe.seed) == (4, 5)


def test_options_change_a_recipe_and_set_wins(photos: str) -> None:
    both = settle("folder", [], Shortcuts(macs="0.6", params="2M")).prune.target
    assert (both.macs, both.params) == (0.6, 2e6)
    recipe = settle("folder", ["train.epochs=7"], Shortcuts(data=photos, params="2M", epochs=3))
    assert (recipe.model.arch, recipe.model.classes) == ("torchvision:resnet50", 3)
    assert (recipe.prune.target.macs, recipe.prune.target.params) == (None, 2e6)
    assert (recipe.train.epochs, recipe.finetune.epochs, str(recipe.data.root)) == (7, 3, "photos")


def test_epochs_add_no_stage_that_a_recipe_leaves_out() -> None:
    recipe = settle("vgg16-otov2", [], Shortcuts(epochs=3))
    assert (recipe.train.epochs, recipe.finetune.epochs) == (3, 0)


def test_a_published_model_names_the_architecture(photos: str) -> None:
    assert settle(None, [], Shortcuts(data=photos), model="torchvision:resnet34").model.arch == "torchvision:resnet34"


def save_photo_model(arch: str | None, classes: int = 3) -> None:
    """Write slim.pt: a network for images of 40×40 whose pixels were scaled in its own way."""
    module = build("resnet20", classes=classes, shape=(3, 40, 40))
    metadata = Metadata(classes, Framing((3, 40, 40)), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), arch=arch)
    save_slim(Path("slim.pt"), module, recipe="", report={}, metadata=metadata, dense=module)


def test_a_slim_model_names_its_architecture_and_its_inputs(photos: str) -> None:
    save_photo_model("resnet20")
    recipe = settle(None, [], Shortcuts(data=photos), model="slim.pt")
    assert (recipe.model.arch, recipe.model.input) == ("resnet20", (3, 40, 40))
    assert (recipe.data.mean, recipe.data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_what_was_typed_wins_over_what_a_slim_model_says(photos: str) -> None:
    save_photo_model("resnet20")
    recipe = settle(None, ["data.mean=[0, 0, 0]"], Shortcuts(data=photos, arch="resnet20"), model="slim.pt")
    assert (recipe.data.mean, recipe.data.std) == ((0.0, 0.0, 0.0), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        ("nets:Net", None, "names code to import, 'nets:Net'"),
        (None, None, "was pruned from a Python object"),
        ("resnet20", "resnet56", "holds a resnet20, model.arch is resnet56"),
    ],
)
def test_an_architecture_that_only_a_file_names_is_never_imported(
    photos: str, saved: str | None, given: str | None, message: str
) -> None:
    save_photo_model(saved)
    with pytest.raises(ModelFileError, match=message):
        settle(None, [], Shortcuts(data=photos, arch=given), model="slim.pt")


def test_an_option_is_consent_to_the_code_that_it_names(photos: str) -> None:
    recipe = settle(None, [], Shortcuts(data=photos, arch="nets:Net"), model="model.pt")
    assert (recipe.code_to_trust, recipe.code) == ({}, {"model.arch": "nets:Net"})


def test_settings_that_are_missing_are_asked_for(photos: str) -> None:
    with pytest.raises(UsageError, match="no settings are given: name a --recipe, or --data"):
        settle(None, [], Shortcuts(), model="model.pt")
    with pytest.raises(UsageError, match=r"which architecture has model\.pt\? --arch names it"):
        settle(None, [], Shortcuts(data=photos), model="model.pt")

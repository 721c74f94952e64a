"""Predictions by the metadata of a file alone: slim, TorchScript, ONNX, and the README's five lines agree."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import dpm_cli
from dpm_cli.errors import DataError, ModelFileError, UnreadableError, UsageError
from dpm_cli.jobs.predict import prepare
from dpm_cli.models import Metadata, build, load_slim
from dpm_cli.models.metadata import VERSION, parse_metadata, parse_strings

NAMES = ("Affe", "Bär", "猫", *(f"class {number}" for number in range(3, 10)))
ODD_SIZES = [(61, 47), (47, 61), (32, 32), (333, 255), (31, 500), (500, 31)]
FORMATS = ("torchscript", "onnx")
FRAMINGS: dict[str, dict[str, Any]] = {"cover": {}, "resize": {"resize": 40}}


@pytest.fixture(scope="module", params=FRAMINGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """slim.pt, model.ts, model.onnx and model.json of one net, and pictures of odd sizes."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = build("digits", classes=10, shape=(3, 32, 32))
    model.train()
    with torch.no_grad():
        blobs = torch.nn.functional.interpolate(2 * torch.randn(64, 3, 5, 7), (32, 32), mode="bilinear")
        model(blobs)  # moves the running statistics, so that outputs are far from zero
        model.linear.bias -= model.eval()(blobs).mean(0)  # no class is everybody's
        model.linear.weight *= 20
        model.linear.bias *= 20
    dpm_cli.save(
        model, folder / "slim.pt", arch="digits", shape=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3),
        names=NAMES, **FRAMINGS[request.param],
    )  # fmt: skip
    dpm_cli.export_slim(folder / "slim.pt", formats=FORMATS, output=folder)
    for number, (width, height) in enumerate(ODD_SIZES):
        draw(folder / f"{number}.jpg", width, height, seed=number)
    return folder


def draw(path: Path, width: int, height: int, *, seed: int) -> None:
    """Save a picture of soft blobs, so that a shift by a pixel changes little and another crop changes much."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95)


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jpg"))


@pytest.mark.every(2)
def test_all_files_say_the_same_about_pictures_of_odd_sizes(folder: Path) -> None:
    slim, *others = (dpm_cli.predict(folder / file, pictures(folder)) for file in ("slim.pt", "model.ts", "model.onnx"))
    assert len({each.classes for each in slim}) > 1
    for other in others:
        for said, again in zip(slim, other, strict=True):
            assert [guess.name for guess in said.classes] == [guess.name for guess in again.classes]
            assert [guess.probability for guess in said.classes] == pytest.approx(
                [guess.probability for guess in again.classes], abs=1e-4
            )


def test_load_and_the_metadata_give_the_same_answer(folder: Path) -> None:
    module, metadata = dpm_cli.load(folder / "slim.pt"), load_slim(folder / "slim.pt").metadata
    for picture, said in zip(pictures(folder), dpm_cli.predict(folder / "model.onnx", pictures(folder), top=1)):
        with torch.no_grad():
            logits = module(prepare(picture, metadata)[None])
        assert metadata.name_of(int(logits.argmax())) == said.classes[0].name


def readme_block(marker: str) -> str:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {marker} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("marker", ["onnxruntime", "load"])
def test_the_lines_of_the_readme_say_what_predict_says(
    folder: Path, marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if marker == "onnxruntime" and folder.name.startswith("resize"):
        pytest.skip("the lines are those of the default framing")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "out")
    for picture in pictures(folder):
        shutil.copy(picture, tmp_path / "photo.jpg")
        exec(readme_block(marker), {})
        (said,) = dpm_cli.predict("out/model.onnx", ["photo.jpg"], top=1)
        assert capsys.readouterr().out.split()[0] == said.classes[0].name.split()[0]


def test_every_file_holds_what_model_json_holds(folder: Path) -> None:
    written = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    assert (written["names"], written["task"], written["color"]) == (list(NAMES), "classification", "RGB")
    metadata = parse_metadata(written, folder)
    assert load_slim(folder / "slim.pt").metadata == metadata
    properties = {each.key: each.value for each in onnx.load(folder / "model.onnx").metadata_props}
    assert parse_strings(properties, folder) == metadata


def test_a_file_without_names_gives_numbers() -> None:
    metadata = Metadata(3, dpm_cli.models.metadata.Framing((1, 4, 4)), (0.0,), (1.0,))
    assert metadata.name_of(2) == "2"
    assert parse_strings(metadata.to_strings(), Path("x")) == metadata


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "names": lambda values: values["names"].pop(),
    "input": lambda values: values.update(input=[3, 0, 32]),
    "std": lambda values: values.update(std=[0.0, 1.0, 1.0]),
    "mean": lambda values: values.update(mean=[0.0]),
    "resize": lambda values: values.update(resize="256"),
    "crop": lambda values: values.update(crop=[]),
    "color": lambda values: values.update(color="BGR"),
    "classes": lambda values: values.update(classes=True),
    "version": lambda values: values.update(version="1"),
}


@pytest.mark.parametrize("key", DAMAGE)
def test_damaged_metadata_is_named(key: str) -> None:
    metadata = Metadata(2, dpm_cli.models.metadata.Framing((3, 32, 32)), (0.0,) * 3, (1.0,) * 3, ("a", "b"))
    values = metadata.to_dict()
    DAMAGE[key](values)
    with pytest.raises(ModelFileError, match=f"damaged metadata .'{key}'"):
        parse_metadata(values, Path("m.onnx"))


@pytest.mark.parametrize("folder", ["cover"], indirect=True)
@pytest.mark.thorough
def test_wrong_files_and_pictures_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    bare, newer = tmp_path / "bare.onnx", tmp_path / "newer.onnx"
    onnx.helper.set_model_props(model, {"version": str(VERSION + 1), "input": "[]"})
    onnx.save(model, newer)
    del model.metadata_props[:]
    onnx.save(model, bare)
    weights, text, picture = tmp_path / "weights.pt", tmp_path / "a.jpg", pictures(folder)[0]
    torch.save(build("digits", classes=10, shape=(3, 32, 32)).state_dict(), weights)
    text.write_text("not a picture")
    cases: list[tuple[Path, list[Path], type[Exception], str]] = [
        (bare, [picture], ModelFileError, "does not say how a picture becomes its input"),
        (newer, [picture], ModelFileError, "version 2, this dpm reads 1: update"),
        (weights, [picture], ModelFileError, "holds weights only"),
        (folder / "model.onnx", [text], DataError, "not a readable image"),
        (
            folder / "model.onnx",
            [picture, tmp_path / "no.jpg", tmp_path / "or.jpg"],
            DataError,
            "no.jpg .*or.jpg is not",
        ),
        (folder / "model.onnx", [], UsageError, "no picture"),
    ]
    for file, images, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            dpm_cli.predict(file, images)
        assert "\n" not in str(caught.value)


def test_pictures_that_cannot_be_read_do_not_stop_the_others(folder: Path, tmp_path: Path) -> None:
    good = pictures(folder)
    with pytest.raises(UnreadableError) as caught:
        dpm_cli.predict(folder / "slim.pt", [good[0], tmp_path / "no.jpg", good[1]])
    first, missing, last = caught.value.predicted
    assert [first, last] == dpm_cli.predict(folder / "slim.pt", good[:2])
    assert missing.to_dict() == {"image": f"{tmp_path / 'no.jpg'}", "error": f"{tmp_path / 'no.jpg'} is not a file"}


OTHER = '{"dpm_recipe": ""}'


def test_a_folder_of_another_model_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(OTHER)
    with pytest.raises(UsageError, match="describes another model"):
        dpm_cli.export_slim(folder / "slim.pt", formats=FORMATS, output=tmp_path)
    assert (tmp_path / "model.json").read_text() == OTHER

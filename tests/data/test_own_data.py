"""Datasets of the user's own code, `package.module:function`, and of the Hugging Face library."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_cli.data import Images, Splits
from dpm_cli.errors import DataError, RecipeError

Load = Callable[..., Splits]
CODE = """
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
LABELS = [index % 3 for index in range(30)]
PICTURES = [Image.fromarray(pixels) for pixels in PIXELS]
TENSORS = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())

class Own(Dataset):
    classes = ["x", "y", "z"]

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], LABELS[index]

def pictures(): return Own(PICTURES)
def arrays(): return Own(PIXELS)
def tensors(): return TensorDataset(TENSORS, torch.tensor(LABELS))
def floats(): return Own(TENSORS / 255)
def generated():
    for picture, label in zip(PICTURES, LABELS):
        yield picture, "xyz"[label]
def listed(): return list(zip(PICTURES, LABELS))
def pair(): return Own(PICTURES), Own(PICTURES[:6])
def mapping(root, classes): return {"train": Own(PICTURES), "val": Own(PICTURES[:classes * 2])}

def number(): return 7
def normalised(): return Own(TENSORS / 255 * 4 - 2)
def triples(): return [(picture, label, 1) for picture, label in zip(PICTURES, LABELS)]
def fractions(): return [(picture, label / 2) for picture, label in zip(PICTURES, LABELS)]
def failing():
    yield PICTURES[0], 0
    raise OSError("the disk is gone")
def endless():
    while True:
        yield PICTURES[0], 0
def too_many(): return [(picture, index) for index, picture in enumerate(PICTURES)]
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's in the current folder."""
    name = f"own_data_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return name


def pixels_of(split: Any) -> torch.Tensor:
    assert isinstance(split, Images)
    return split.pixels


@pytest.mark.parametrize("function", ["pictures", "arrays", "tensors", "floats", "generated", "listed"])
def test_images_of_every_kind_are_the_same(load: Load, code: str, function: str) -> None:
    splits = load(f"{code}:{function}", validation=0)
    own = sys.modules[code]
    assert (len(splits.train), len(splits.test), splits.test_held_out) == (27, 3, True)
    every = torch.cat([pixels_of(splits.train), pixels_of(splits.test)])
    assert sorted(bytes(image.numpy()) for image in every) == sorted(bytes(image.numpy()) for image in own.TENSORS)
    named = {"pictures": ("x", "y", "z"), "generated": ("x", "y", "z")}.get(function)
    assert splits.names == (named or (("x", "y", "z") if function in ("arrays", "floats") else ("0", "1", "2")))


@pytest.mark.parametrize("function", ["pair", "mapping"])
def test_test_images_may_be_given(load: Load, code: str, function: str) -> None:
    splits = load(f"{code}:{function}", validation=0)
    assert (len(splits.train), len(splits.test), splits.test_held_out) == (30, 6, False)


def test_images_are_brought_to_the_input(load: Load, code: str) -> None:
    splits = load(f"{code}:pictures", validation=0, shape=(1, 4, 6))
    assert pixels_of(splits.train).shape == (27, 1, 4, 6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("number", "returned a int; expected a torch dataset or an iterable of .image, label."),
        ("normalised", "has values from .* not normalised"),
        ("triples", "image 0 of data.name .* is a tuple; expected"),
        ("fractions", "has a float as label; an int or the name of a class is expected"),
        ("failing", "failed while it gave images: OSError: the disk is gone"),
        ("too_many", "has 30 classes but model.classes is 3; set it to 30"),
    ],
)
def test_a_function_that_gives_something_else_is_one_line(load: Load, code: str, function: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(f"{code}:{function}")


def test_an_endless_iterable_ends_where_memory_does(load: Load, code: str) -> None:
    with pytest.raises(DataError, match=r"gives more than the 10 images that data.memory_limit holds: raise it, or"):
        load(f"{code}:endless", memory_limit=10 * 3 * 8 * 8)


def test_an_absent_function_is_named(load: Load, code: str) -> None:
    with pytest.raises(RecipeError, match=f"data.name '{code}:nothing': {code} has no function 'nothing'"):
        load(f"{code}:nothing")


# ------------------------------------------------------------------------------------------------------ Hugging Face


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    return datasets


@pytest.mark.slow  # the library takes seconds to import
@pytest.mark.filterwarnings("ignore")  # of the library and of those that it uses
@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
def test_hugging_face_datasets_give_what_the_folder_gives(
    load: Load, folder: Path, tmp_path: Path, hub: Any, kind: str
) -> None:
    root = folder
    if kind == "parquet":
        root = tmp_path / "parquet"
        root.mkdir()
        for split in ("train", "test"):
            files = [(name, path) for name in "abc" for path in sorted((folder / split / name).iterdir())]
            features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=list("abc"))})
            columns = {"image": [str(path) for _, path in files], "label": [name for name, _ in files]}
            hub.Dataset.from_dict(columns, features=features).to_parquet(str(root / f"{split}.parquet"))
    found, expected = load(f"hf:{kind}", root=root), load("folder", root=folder)
    assert found.names == ("a", "b", "c")
    assert not found.test_held_out
    for split in ("train", "validation", "test"):
        mine, folders = getattr(found, split), getattr(expected, split)
        assert torch.equal(pixels_of(mine), pixels_of(folders))
        assert torch.equal(mine.labels, folders.labels)


@pytest.mark.slow  # the library takes seconds to import
@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_dataset_without_images_is_one_line(load: Load, tmp_path: Path, hub: Any) -> None:
    hub.Dataset.from_dict({"text": ["a"] * 9}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(DataError, match=r"data.name hf:parquet has the columns text, but none holds images"):
        load("hf:parquet", root=tmp_path)


@pytest.mark.slow  # the library takes seconds to import
@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_dataset_starts_no_other_program_for_an_image(load: Load, tmp_path: Path, hub: Any) -> None:
    """Pillow would have Ghostscript draw it."""
    script = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "path": None}
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=list("abc"))})
    columns = {"image": [script] * 9, "label": list("abc") * 3}
    hub.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(DataError, match=r"image 0 of .* is not a readable image .none of BMP"):
        load("hf:parquet", root=tmp_path)


@pytest.mark.slow  # the library takes seconds to import
@pytest.mark.filterwarnings("ignore")
def test_an_absent_hugging_face_dataset_is_one_line(load: Load, tmp_path: Path, hub: Any) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"hf:imagefolder cannot be loaded from .*; local files are read by"):
        load("hf:imagefolder", root=tmp_path / "empty")
    with pytest.raises(DataError, match="cannot be loaded from the hub or its cache"):
        load("hf:nobody/nothing", root=tmp_path, download=False)

"""Images listed in a table: CSV or JSON lines, with or without a header, and what is said of broken ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_cli.data import Images, Splits, Streamed
from dpm_cli.errors import DataError

Load = Callable[..., Splits]


def pixels_and_labels(split: Any) -> tuple[torch.Tensor, list[int]]:
    assert isinstance(split, Images)
    return split.pixels, split.labels.tolist()


@pytest.fixture
def rows(folder: Path) -> list[tuple[str, str]]:
    """The training images of the folder in its order: path relative to it, and class."""
    return [(f"train/{name}/{number:03}.png", name) for name in "abc" for number in range(10)]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["bare", "header", "columns", "tsv", "jsonl", "absolute"])
def test_a_table_gives_what_the_folder_gives(load: Load, folder: Path, rows: list[tuple[str, str]], kind: str) -> None:
    tables = {
        "bare": ("all.csv", [f"{path},{label}" for path, label in rows]),
        "header": ("all.csv", ["path,label", *(f"{path},{label}" for path, label in rows)]),
        "columns": ("all.csv", ["label, size, filename", *(f"{label},8,{path}" for path, label in rows)]),
        "tsv": ("all.tsv", [f"{path}\t{label}" for path, label in rows]),
        "jsonl": ("all.jsonl", [json.dumps({"file_name": path, "label": label, "by": 1}) for path, label in rows]),
        "absolute": ("all.csv", [f"{folder / path},{label}" for path, label in rows]),
    }
    name, lines = tables[kind]
    table = write(folder / name, lines)
    found, expected = load("csv", root=table), load("folder", root=folder / "train")
    assert found.names == expected.names == ("a", "b", "c")
    assert found.test_held_out
    assert (len(found.train), len(found.validation), len(found.test)) == (22, 5, 3)
    every = [(bytes(image.numpy()), label) for split in (found.train, found.validation, found.test)
             for image, label in zip(*pixels_and_labels(split))]  # fmt: skip
    wanted = [(bytes(image.numpy()), label) for split in (expected.train, expected.validation, expected.test)
              for image, label in zip(*pixels_and_labels(split))]  # fmt: skip
    assert sorted(every) == sorted(wanted)


def test_a_column_says_which_images_are_for_testing(load: Load, folder: Path, rows: list[tuple[str, str]]) -> None:
    tests = [f"test/{name}/{number:03}.png,{name},test" for name in "abc" for number in range(4)]
    table = write(folder / "all.csv", [*tests, *(f"{path},{label},train" for path, label in rows)])
    found, expected = load("csv", root=table), load("folder", root=folder)
    assert not found.test_held_out
    assert torch.equal(pixels_and_labels(found.test)[0], pixels_and_labels(expected.test)[0])
    assert torch.equal(pixels_and_labels(found.train)[0], pixels_and_labels(expected.train)[0])


def test_two_tables_are_training_and_test(load: Load, folder: Path, rows: list[tuple[str, str]]) -> None:
    write(folder / "train.csv", [f"{path},{label}" for path, label in rows])
    write(folder / "val.csv", [f"test/{name}/{number:03}.png,{name}" for name in "abc" for number in range(4)])
    found = load("csv", root=folder)
    assert torch.equal(pixels_and_labels(found.test)[0], pixels_and_labels(load("folder", root=folder).test)[0])


def test_numbers_as_labels_are_sorted_as_numbers(load: Load, folder: Path, rows: list[tuple[str, str]]) -> None:
    table = write(folder / "all.csv", [f"{path},{index % 12}" for index, (path, _) in enumerate(rows)])
    assert load("csv", root=table, classes=12).names == tuple(map(str, range(12)))


def test_a_large_table_is_streamed(load: Load, folder: Path, rows: list[tuple[str, str]]) -> None:
    table = write(folder / "all.csv", [f"{folder / path},{label}" for path, label in rows])
    assert isinstance(load("csv", root=table, memory_limit=100).train, Streamed)


def test_without_labels_paths_are_enough(load: Load, folder: Path, rows: list[tuple[str, str]]) -> None:
    table = write(folder / "all.csv", [path for path, _ in rows])
    found = load("csv", root=table, labels=False)
    assert (len(found.train) + len(found.validation), len(found.test)) == (30, 0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [*(f"gone/{index}.png,a" for index in range(5)), "train/a/000.png,a"],
            r"names 5 files that are not there: gone/0\.png, gone/1\.png, gone/2\.png and 2 more; paths are relative",
        ),
        (["train/a/000.png,a", "train/b/000.png"], "line 2 has no label; expected one image per line: path,label"),
        (["path,label", ",a"], "line 2 has no path"),
        (["train/a/000.png,a,dev"], "line 1 has the split 'dev'; known: train, test"),
        (["train/a/000.png,a"], "has 1 classes .a. but model.classes is 3; set it to 1"),
        (["", ""], "lists no images"),
    ],
    ids=["missing", "no label", "no path", "split", "classes", "empty"],
)
def test_what_is_wrong_with_a_table_is_one_line(load: Load, folder: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load("csv", root=write(folder / "all.csv", lines))


def test_a_broken_json_line_is_named(load: Load, folder: Path) -> None:
    table = write(folder / "all.jsonl", ['{"path": "train/a/000.png", "label": "a"}', "{"])
    with pytest.raises(DataError, match=r"all\.jsonl line 2 is not a JSON object"):
        load("csv", root=table)


def test_an_absent_table_is_named(load: Load, folder: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv is not there; expected one image per line"):
        load("csv", root=folder / "nowhere.csv")
    with pytest.raises(DataError, match=r"has no train\.csv or train\.jsonl; name the table itself"):
        load("csv", root=folder)

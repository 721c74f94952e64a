"""Mutants of sound files, made by a seeded fuzzer: each is read, or refused by an error of ours in one line."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attack import bounded
from cli.made_up_report import make_report
from digits_recipe import recipe
from PIL import Image

from dpm_cli.data import load_data
from dpm_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from dpm_cli.errors import DpmError
from dpm_cli.export import onnx, open_exported, torchscript
from dpm_cli.export.ours_onnx import find_foreign
from dpm_cli.jobs.prune import _earlier_report
from dpm_cli.models import build, load_model, load_slim
from dpm_cli.recipe import load_recipe, parse_recipe
from dpm_cli.recipe.sections import Data

FEW, MANY = 300, 10_000
SCRAPS = (b"PK\x03\x04", b"cos\nsystem\n", b"!!python/name:os.abort ", b"{" * 500)


def read_weights(path: Path) -> object:
    return load_model(path, arch="digits", classes=10, shape=(1, 8, 8))


def read_annotations(path: Path) -> object:
    return load_data(Data(name="csv", root=path, validation=0, max_corrupt=99), shape=(1, 8, 8), classes=2, seed=0)


def read_checkpoint(path: Path) -> object:
    return load_checkpoint(path)


def read_report(path: Path) -> object:
    return _earlier_report(path.parent, parse_recipe(recipe()))


READERS: dict[str, Callable[[Path], object]] = {
    "model.pt": read_weights,
    "model.safetensors": read_weights,
    "slim.pt": load_slim,
    "recipe.yaml": load_recipe,
    "model.ts": open_exported,
}


OTHERS: dict[str, Callable[[Path], object]] = {
    "images.csv": read_annotations,
    "images.jsonl": read_annotations,
    "checkpoint.pt": read_checkpoint,
    "report.json": read_report,
    "model.onnx": find_foreign,
}


def mutate(content: bytes, dice: random.Random) -> bytes:
    """Flip, overwrite, cut, repeat or insert bytes in a few places, often in the directory at the end or the head."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        size = len(data)
        if not size:
            break
        near = dice.choice([size, min(size, 300)])
        place = dice.randrange(near) if dice.random() < 0.5 else size - 1 - dice.randrange(near)
        length = dice.choice([1, 1, 2, 4, 8, 64])
        match dice.randrange(6):
            case 0:
                data[place] ^= 1 << dice.randrange(8)
            case 1:
                data[place : place + length] = dice.randbytes(length)
            case 2:
                data[place : place + length] = dice.choice([b"\xff", b"\0", b"\x7f"]) * length
            case 3:
                del data[place : place + dice.choice([length, size // 3])]
            case 4:
                data[place:place] = data[place : place + length] * dice.choice([1, 2, 50])
            case _:
                data[place:place] = dice.choice(
                    [b"PK\x03\x04", b"cos\nsystem\n", b"!!python/name:os.abort ", b"{" * 500]
                )
    return bytes(data)


@pytest.fixture(scope="session")
def sound(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What every kind of file holds when nobody has damaged it."""
    torch.manual_seed(0)
    module, images, folder = build("digits", classes=10, shape=(1, 8, 8)).eval(), torch.zeros(2, 1, 8, 8), originals
    sound = {name: (folder / name).read_bytes() for name in READERS if name != "model.ts"}
    sound["model.ts"] = torchscript.serialise(module, images, {"arch": "digits"})
    sound["model.onnx"] = onnx.serialise(module, images, {"dpm_recipe": "abc"}, opset=18)
    save_checkpoint(folder / "checkpoint.pt", {"stage": 0, "step": 3, "weights": module.state_dict()})
    sound["checkpoint.pt"] = (folder / "checkpoint.pt").read_bytes()
    sound["report.json"] = make_report().to_json().encode()
    for number in range(12):
        Image.new("L", (8, 8), 20 * number).save(folder / f"{number}.png")
    places = [(folder / f"{number}.png", number % 2, ("train", "test")[number > 8]) for number in range(12)]
    sound["images.csv"] = "\n".join(["path,label,split", *(f"{p},{label},{s}" for p, label, s in places)]).encode()
    lines = [json.dumps({"path": str(path), "label": label, "split": split}) for path, label, split in places]
    sound["images.jsonl"] = "\n".join(lines).encode()
    return sound


def attack(
    sound: dict[str, bytes], folder: Path, numbers: range, readers: dict[str, Callable[[Path], object]] = READERS
) -> int:
    """Read mutants; return how many were refused. Raises AssertionError that names a mutant that does not hold."""
    names, refused = list(readers), 0
    for number in numbers:
        name = names[number % len(names)]
        path = folder / name
        path.write_bytes(mutate(sound[name], random.Random(number)))
        said = ""
        try:
            with bounded(path.stat().st_size):
                readers[name](path)
        except DpmError as error:
            refused += 1
            said = str(error)
        except Exception as error:
            raise AssertionError(f"mutant {number} of {name}: {type(error).__name__}: {error}") from error
        assert "\n" not in said, (number, name)
    return refused


def test_mutants_are_read_or_refused(sound: dict[str, bytes], tmp_path: Path) -> None:
    assert attack(sound, tmp_path, range(FEW)) > FEW // 3


@pytest.mark.parametrize("name", OTHERS)
def test_sound_files_are_read(sound: dict[str, bytes], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(sound[name])
    said = ""
    try:
        OTHERS[name](tmp_path / name)
    except DpmError as error:
        said = str(error)
    assert said == "" or (name == "report.json" and "another recipe" in said)


def test_mutants_of_other_files_are_read_or_refused(sound: dict[str, bytes], tmp_path: Path) -> None:
    attack(sound, tmp_path, range(FEW), OTHERS)


@pytest.mark.slow
def test_many_mutants_of_other_files_are_read_or_refused(sound: dict[str, bytes], tmp_path: Path) -> None:
    attack(sound, tmp_path, range(FEW, MANY), OTHERS)


@pytest.mark.slow
def test_many_mutants_are_read_or_refused(sound: dict[str, bytes], tmp_path: Path) -> None:
    assert attack(sound, tmp_path, range(FEW, MANY)) > MANY // 3


def test_mutant_whose_code_does_not_unpack(sound: dict[str, bytes], tmp_path: Path) -> None:
    """Met by the long run: zlib raises an error of its own."""
    attack(sound, tmp_path, range(1934, 1935))

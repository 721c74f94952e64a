"""Mutants of sound files, made by a seeded fuzzer: each is read, or refused by an error of ours in one line."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpm_cli.errors import DpmError
from dpm_cli.export import open_exported, torchscript
from dpm_cli.models import build, load_model, load_slim
from dpm_cli.recipe import load_recipe

FEW, MANY = 300, 10_000
SCRAPS = (b"PK\x03\x04", b"cos\nsystem\n", b"!!python/name:os.abort ", b"{" * 500)


def read_weights(path: Path) -> object:
    return load_model(path, arch="digits", classes=10, shape=(1, 8, 8))


READERS: dict[str, Callable[[Path], object]] = {
    "model.pt": read_weights,
    "model.safetensors": read_weights,
    "slim.pt": load_slim,
    "recipe.yaml": load_recipe,
    "model.ts": open_exported,
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


def attack(originals: Path, folder: Path, numbers: range) -> int:
    """Read mutants; return how many were refused. Raises AssertionError that names a mutant that does not hold."""
    torch.manual_seed(0)
    sound = {name: (originals / name).read_bytes() for name in READERS if name != "model.ts"}
    module = build("digits", classes=10, shape=(1, 8, 8)).eval()
    sound["model.ts"] = torchscript.serialise(module, torch.zeros(2, 1, 8, 8), {"arch": "digits"})
    names, refused = list(READERS), 0
    for number in numbers:
        name = names[number % len(names)]
        path = folder / name
        path.write_bytes(mutate(sound[name], random.Random(number)))
        said = ""
        try:
            READERS[name](path)
        except DpmError as error:
            refused += 1
            said = str(error)
        except Exception as error:
            raise AssertionError(f"mutant {number} of {name}: {type(error).__name__}: {error}") from error
        assert "\n" not in said, (number, name)
    return refused


def test_mutants_are_read_or_refused(originals: Path, tmp_path: Path) -> None:
    assert attack(originals, tmp_path, range(FEW)) > FEW // 3


@pytest.mark.slow
def test_many_mutants_are_read_or_refused(originals: Path, tmp_path: Path) -> None:
    assert attack(originals, tmp_path, range(FEW, MANY)) > MANY // 3


def test_mutant_whose_code_does_not_unpack(originals: Path, tmp_path: Path) -> None:
    """Met by the long run: zlib raises an error of its own."""
    attack(originals, tmp_path, range(1934, 1935))

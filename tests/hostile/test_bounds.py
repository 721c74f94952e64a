"""Small files that ask for much: memory and time of a refusal are bounded by the size of the file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from attack import MEGABYTE, Answer, Attacker, assert_held, bounded

from dpm_cli.models.packed import pack, unpack

HUGE = ("torchvision:vit_h_14", "torchvision:regnet_y_128gf", "timm:vit_7b_patch16_dinov3")


def attack_slim(attacker: Attacker, originals: Path, folder: Path, **changes: Any) -> Answer:
    """Change a sound slim.pt, and export it. The answer must hold."""
    path = folder / "slim.pt"
    torch.save(torch.load(originals / "slim.pt", weights_only=True) | changes, path)
    answer = attacker.run("export", "slim.pt", "--format", "torchscript", "-o", "there", folder=folder)
    assert_held(answer, path.stat().st_size, folder)
    return answer


@pytest.mark.parametrize("arch", HUGE)
@pytest.mark.thorough
def test_slim_file_that_names_a_huge_architecture(
    attacker: Attacker, originals: Path, tmp_path: Path, arch: str
) -> None:
    changes = {"arch": arch, "shape": [3, 224, 224], "mean": [0.0] * 3, "std": [1.0] * 3}
    assert attack_slim(attacker, originals, tmp_path, **changes).code == 2


@pytest.mark.thorough
def test_slim_file_that_names_every_tensor_of_a_huge_architecture(
    attacker: Attacker, originals: Path, tmp_path: Path
) -> None:
    """Each is there, as a single number; all sizes fit."""
    from dpm_cli.models.sketch import sketch

    huge = sketch("torchvision:vit_h_14", classes=10, shape=(3, 224, 224))
    assert huge is not None
    changes = {"arch": "torchvision:vit_h_14", "shape": [3, 224, 224], "mean": [0.0] * 3, "std": [1.0] * 3}
    tensors = {name: torch.zeros([1] * tensor.dim()) for name, tensor in huge.state_dict().items()}
    tensors["heads.head.bias"] = torch.zeros(10)
    assert attack_slim(attacker, originals, tmp_path, **changes, state_dict=tensors).code == 2


@pytest.mark.thorough
def test_slim_file_that_names_a_huge_image(attacker: Attacker, originals: Path, tmp_path: Path) -> None:
    assert attack_slim(attacker, originals, tmp_path, shape=[1, 2048, 2048]).code == 2


@pytest.mark.parametrize("arch", HUGE[:2])
def test_weights_under_a_recipe_of_a_huge_architecture(
    attacker: Attacker, originals: Path, tmp_path: Path, arch: str
) -> None:
    path = originals / "model.pt"
    changes = (f"model.arch={arch}", "model.input=[3,224,224]")
    answer = attacker.run(
        "inspect", path, "-r", originals / "recipe.yaml", *(each for change in changes for each in ("--set", change)),
        folder=tmp_path,
    )  # fmt: skip
    assert answer.code == 2
    assert "does not fit" in answer.err
    assert_held(answer, path.stat().st_size, tmp_path)


@pytest.mark.parametrize("shape", [[8192, 12288], [64, 1 << 20]])
def test_packed_weights_are_compared_before_they_are_unpacked(
    attacker: Attacker, originals: Path, tmp_path: Path, shape: list[int]
) -> None:
    """12 MB of bits would be 400 MB of weights."""
    count = shape[0] * shape[1]
    bits = torch.zeros(count // 8, dtype=torch.uint8)
    packed = {
        "mask": bits,
        "values": torch.zeros(0),
        "fillings": torch.zeros(shape[0], 1),
        "shape": torch.tensor(shape),
    }
    answer = attack_slim(attacker, originals, tmp_path, version=2, packed={"linear.weight": packed})
    assert answer.code == 2


@pytest.mark.thorough
def test_unpacking_needs_at_most_twice_the_unpacked_size() -> None:
    weight = torch.zeros(256, 1 << 16)  # 64 MB
    weight[:, ::3] = torch.arange(256.0)[:, None]
    weight[:, 1::3] = 2.0
    packed = pack(weight, weight == torch.arange(256.0)[:, None])
    with bounded(0, more=2 * 64 * MEGABYTE):
        unpacked = unpack(packed)
    assert torch.equal(unpacked, weight)

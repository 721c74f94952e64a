from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dpm_cli.errors import ModelFileError
from dpm_cli.layers.images import Framing
from dpm_cli.models import Metadata, load, save_slim
from dpm_cli.models.packed import pack, unpack

FILLINGS = ["zero", "one", "two"]


def make(shape, sparsity, filling, seed=0, dtype=torch.float32):
    """A weight and its mask, with no, one or two numbers a filter in the place of what was cut."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator).to(dtype)
    mask = torch.rand(*shape, generator=generator) >= sparsity
    if filling != "zero":
        numbers = torch.randn(2, shape[0], *[1] * (len(shape) - 1), generator=generator).to(dtype)
        second = torch.rand(*shape, generator=generator) < 0.5
        filled = torch.where(second & (filling == "two"), *numbers)
    else:
        filled = torch.zeros_like(weight)
    return torch.where(mask, weight, filled), mask


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    sparsity=st.floats(0, 1),
    filling=st.sampled_from(FILLINGS),
    seed=st.integers(0, 10**6),
)
def test_what_is_packed_is_unpacked_bit_for_bit(shape, sparsity, filling, seed):
    weight, mask = make(shape, sparsity, filling, seed)
    assert torch.equal(unpack(pack(weight, mask)), weight)


def test_other_number_types_and_layouts_are_packed():
    weight, mask = make((4, 3, 3, 3), 0.5, "one", dtype=torch.bfloat16)
    last = unpack(pack(weight.to(memory_format=torch.channels_last), mask))
    assert torch.equal(last, weight)
    assert last.dtype == torch.bfloat16


def test_three_numbers_in_a_filter_are_refused():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(ValueError, match="more than two"):
        pack(weight, torch.zeros(1, 4, dtype=torch.bool))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 32, 3), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 4)).eval()


def save(path, sparsity, filling="zero"):
    module = net()
    weight, mask = make((32, 32, 3, 3), sparsity, filling)
    module[1].weight.data = weight
    save_slim(
        path, module, metadata=Metadata(4, Framing((1, 8, 8)), (0.5,), (0.25,)), recipe="", report={},
        dense=net(), masks={"1.weight": mask},
    )  # fmt: skip
    return module


@pytest.mark.parametrize("filling", FILLINGS)
def test_a_slim_file_shrinks_with_sparsity_and_gives_the_same_module(tmp_path, filling):
    sizes = []
    for sparsity in (0.0, 0.3, 0.6, 0.9):
        path = tmp_path / f"{sparsity}.pt"
        module = save(path, sparsity, filling)
        loaded = load(path, model=net())
        assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        assert torch.load(path, weights_only=True)["version"] == 2
        sizes.append(path.stat().st_size)
    kept_bytes = 32 * 32 * 9 * 4
    for before, after in pairwise(sizes):
        assert before - after > 0.2 * kept_bytes


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask": torch.zeros(3, dtype=torch.uint8)},
        {"mask": torch.zeros(1152)},
        {"shape": torch.tensor([10**9, 10**9])},
        {"shape": torch.tensor([-32, -32, 3, 3])},
        {"shape": torch.tensor(7)},
        {"values": torch.zeros(3)},
        {"values": torch.zeros(1).expand(10**12)},
        {"fillings": torch.zeros(31)},
        {"choices": torch.zeros(5, dtype=torch.uint8)},
        {"more": torch.zeros(1)},
    ],
)
def test_damaged_packed_weights_are_refused_in_one_line(tmp_path, wrong):
    path = tmp_path / "slim.pt"
    save(path, 0.5)
    content = torch.load(path, weights_only=True)
    content["packed"]["1.weight"] |= wrong
    torch.save(content, path)
    with pytest.raises(ModelFileError) as error:
        load(path, model=net())
    assert "\n" not in str(error.value)

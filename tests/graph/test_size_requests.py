"""Code that asks for the sizes that it was built with goes on when channels are lost."""

import copy
import pickle

import numpy as np
import pytest
import torch
from exactness import assert_removable, outputs_of, random_survivors, randomise_
from torch import nn

from dpm_cli.errors import ModelFileError
from dpm_cli.graph import Groups, Units, compact_, find_groups
from dpm_cli.layers.requests import decode, encode, requests_of
from dpm_cli.models import apply_edits_, find_edits
from dpm_cli.models.structure import named_tensors

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Divides(nn.Module):
    """Attention that takes the width of a head from the width of its input."""

    def __init__(self, heads=4):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = (each.reshape(B * self.heads, N, C // self.heads) for each in (q, k, v))
        out = (torch.bmm(q, k.transpose(1, 2)) * (C // self.heads) ** -0.5).softmax(-1) @ v
        return self.proj(out.view(B, self.heads, N, C // self.heads).transpose(1, 2).reshape(B, N, C))


class Numbers(nn.Module):
    """Views, an expansion and a split by numbers, in the model's own forward."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 24, 2, 2), nn.Conv2d(12, 16, 1)
        self.attention, self.hidden, self.head = Divides(), nn.Linear(16 * 4 * 4, 10), nn.Linear(10, 5)
        self.inner, self.outer = nn.Conv2d(24, 24, 1), nn.Conv2d(24, 24, 1)

    def forward(self, x):
        x = self.stem(x)
        a, b = torch.split(self.inner(x), 12, dim=1)
        gate = self.inner(x).mean((2, 3), keepdim=True).expand(-1, 24, 4, 4)
        x = x + self.outer(torch.cat([a, b], 1).unflatten(1, (24, 1)).squeeze(2) * gate)
        x = x + self.attention(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(-1, 24, 4, 4)
        x = self.middle(x[:, :12].contiguous())
        return self.head(self.hidden(x.view(-1, 16 * 4 * 4)).relu())


def prepare(model: nn.Module) -> tuple[nn.Module, Groups, np.ndarray]:
    """A slim model of half of the units, and how it came about."""
    torch.manual_seed(0)
    randomise_(model, EXAMPLE)
    groups = find_groups(model, EXAMPLE)
    alive = random_survivors(groups)
    slim = copy.deepcopy(model)
    Units(groups, slim).scale_(torch.from_numpy(alive).float())
    compact_(slim, groups, alive)
    return slim, groups, alive


def test_what_asks_for_sizes_by_number_is_pruned_exactly_and_again():
    model = Numbers().double()
    example = EXAMPLE.double()
    randomise_(model, example)
    groups = find_groups(model, example)
    assert {group.name: group.size for group in groups} == {
        "inner": 12,
        "attention.qkv": 4,
        "middle": 16,
        "hidden": 10,
    }
    assert groups.answering == {"", "attention"}
    assert_removable(model, example, groups, random_survivors(groups))


def test_a_slim_layer_is_rebuilt_copied_and_pickled():
    slim, _, _ = prepare(Numbers())
    before = outputs_of(slim, EXAMPLE)[0]
    rebuilt = Numbers().eval()
    apply_edits_(rebuilt, find_edits(slim, Numbers()), dict(named_tensors(slim)))
    for other in (rebuilt, copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(outputs_of(other, EXAMPLE)[0], before)
        assert isinstance(other, Numbers)
        assert requests_of(other) == requests_of(slim) != ()


def test_an_export_of_a_slim_layer_takes_any_batch():
    slim, _, _ = prepare(Numbers())
    more = torch.cat([EXAMPLE, EXAMPLE + 1, EXAMPLE - 1])
    wanted = outputs_of(slim, more)[0]
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(slim, (EXAMPLE,), dynamic_shapes=({0: batch},), strict=False).module()
    with torch.no_grad(), pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(slim, EXAMPLE, check_trace=False)
    for file in (exported, traced):
        assert torch.allclose(file(more), wanted, atol=1e-5)


def test_requests_are_read_as_they_were_written_and_nothing_else():
    slim, _, _ = prepare(Numbers())
    numbers = encode(requests_of(slim))
    assert tuple(decode(numbers)) == requests_of(slim)
    for wrong in (numbers[:-1], [*numbers, 1], [-1, *numbers[1:]], [1, 1, 0, 0, 0], [2, 3, 0, 1, 0, 7, 8, 4]):
        with pytest.raises(ValueError, match="size"):
            decode(wrong)
    with pytest.raises(ModelFileError, match="attention: sizes"):
        apply_edits_(Numbers(), {"attention": {"size_requests": [1, 2, 3]}}, {})

"""Copies of a model for rehearsals: own tensors in the place of some, and nothing of the model's changes with them."""

import copy

import pytest
import torch
from torch import nn

from dpm_cli.graph.copies import copy_module


class Odd(nn.Module):
    """Holds what layers hold: layers in lists, shared layers, bound methods, sets, buffers that no checkpoint has."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.again = self.first
        self.listed = [self.first, {"bn": nn.BatchNorm2d(4)}]
        self.call = self.first.forward
        self.seen, self.sizes, self.named = {1, 2}, [4, (3, 3)], {"a": [1]}
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.itself = (self,)

    def forward(self, x):
        return self.call(x)


def test_a_copy_is_the_model_with_other_tensors():
    model = Odd()
    weight = nn.Parameter(torch.ones(4, 3, 3, 3))
    twin = copy_module(model, {id(model.first.weight): weight, id(model.table): torch.ones(3)})
    assert twin.first.weight is weight
    assert twin.again is twin.first
    assert twin.listed[0] is twin.first
    assert twin.call.__self__ is twin.first
    assert twin.itself[0] is twin
    assert twin.table.sum() == 3
    assert "table" not in twin.state_dict()
    assert torch.equal(twin.first.bias, model.first.bias)
    assert twin.first.bias is not model.first.bias
    assert torch.equal(twin(torch.ones(1, 3, 3, 3))[0, :, 0, 0], 27 + model.first.bias)


def test_changes_of_a_copy_leave_the_model_alone():
    model = Odd()
    before, keys = copy.deepcopy(vars(model)["sizes"]), list(model.state_dict())
    twin = copy_module(model, {})
    twin.seen.add(3), twin.sizes.append(5), twin.named["a"].append(2), twin.named.update(b=[])
    twin.listed[1]["bn"].num_features = 9
    twin.register_buffer("more", torch.zeros(1), persistent=False)
    del twin.again
    twin.first.out_channels = 2
    assert model.seen == {1, 2}
    assert model.sizes == before
    assert model.named == {"a": [1]}
    assert model.listed[1]["bn"].num_features == 4
    assert model.first.out_channels == 4
    assert model.again is model.first
    model.register_buffer("more", torch.zeros(1))
    assert set(model.state_dict()) == {*keys, "more"}


class OwnCopy(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("asked")


class OwnState(nn.Linear):
    def __getstate__(self):
        return {**super().__getstate__(), "was_copied": True}


class OwnReading(nn.Linear):
    def __setstate__(self, state):
        super().__setstate__({**state, "was_read": True})


def test_layers_that_say_how_they_are_copied_are_asked():
    with pytest.raises(RuntimeError, match="asked"):
        copy_module(nn.Sequential(OwnCopy(2, 2)), {})
    twin = copy_module(nn.Sequential(OwnState(2, 2), OwnReading(2, 2), nn.Linear(2, 2)), {})
    assert twin[0].was_copied
    assert twin[1].was_read
    assert twin[2].weight.shape == (2, 2)

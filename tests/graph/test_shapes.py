"""A forward pass that is after shapes alone agrees with torch: on shapes, and on what does not fit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpm_cli.graph.shapes import ANSWERS, ShapesAlone

IMAGES, TOKENS = torch.randn(2, 6, 5, 5), torch.randn(2, 7, 6)
SIX, SEVEN, MATRIX = torch.rand(6), torch.rand(7), torch.randn(9, 6)
WITH_WEIGHTS = {
    F.batch_norm: lambda: F.batch_norm(IMAGES, running_mean=SIX, running_var=SIX, weight=SIX, bias=SIX),
    F.layer_norm: lambda: F.layer_norm(TOKENS, normalized_shape=(6,), weight=SIX, bias=SIX),
    F.linear: lambda: F.linear(TOKENS, weight=MATRIX, bias=MATRIX[:, 0]),
    F.interpolate: lambda: F.interpolate(IMAGES, scale_factor=(1.5, 0.7), mode="bilinear", align_corners=False),
    torch.mean: lambda: torch.mean(IMAGES, dim=(-1, 2)),
    Tensor.mean: lambda: IMAGES.mean(1, keepdim=True),
    torch.relu_: lambda: torch.relu_(IMAGES.clone()),
}
MISFITS = {
    "statistics": lambda: F.batch_norm(IMAGES, SEVEN, SEVEN, SIX, SIX),
    "weights of a batch norm": lambda: F.batch_norm(IMAGES, SIX, SIX, SEVEN, SIX),
    "axes of a layer norm": lambda: F.layer_norm(TOKENS, (7,), SEVEN, SEVEN),
    "weights of a layer norm": lambda: F.layer_norm(TOKENS, (6,), SEVEN, SEVEN),
    "columns": lambda: F.linear(IMAGES, MATRIX),
    "bias": lambda: F.linear(TOKENS, MATRIX, SEVEN),
    "a size too many": lambda: F.interpolate(IMAGES, size=(3, 4, 5)),
    "no size": lambda: F.interpolate(IMAGES, size=0),
    "a mode for other axes": lambda: F.interpolate(IMAGES, size=3, mode="trilinear"),
    "corners of none": lambda: F.interpolate(IMAGES, size=3, align_corners=True),
    "an axis too many": lambda: IMAGES.mean((2, 4)),
    "an axis twice": lambda: IMAGES.mean((2, -2)),
    "inputs of an LSTM": lambda: nn.LSTM(5, 4)(TOKENS),
    "state of an LSTM": lambda: nn.LSTM(6, 4)(TOKENS, (torch.zeros(1, 7, 3), torch.zeros(1, 7, 4))),
}


@pytest.mark.parametrize("function", ANSWERS, ids=lambda function: function.__name__)
def test_shapes_and_types_are_those_of_torch(function):
    call = WITH_WEIGHTS.get(function, lambda: function(IMAGES.bfloat16()))
    wanted = call()
    with ShapesAlone():
        got = call()
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    assert not torch.equal(got, wanted), "it was computed"


@pytest.mark.parametrize("call", MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_raises_as_without(call):
    with pytest.raises((RuntimeError, IndexError, ValueError, NotImplementedError)) as wanted:
        call()
    with ShapesAlone(), pytest.raises(wanted.type) as got:
        call()
    assert str(got.value) == str(wanted.value)


@pytest.mark.parametrize("size", [7, (3, 8)])
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area", "nearest-exact"])
def test_images_of_another_size_have_it(size, mode):
    wanted = F.interpolate(IMAGES, size, mode=mode)
    with ShapesAlone():
        assert F.interpolate(IMAGES, size, mode=mode).shape == wanted.shape


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_an_lstm_has_its_shapes_without_its_steps(layers, bidirectional, batch_first, bias):
    lstm = nn.LSTM(6, 4, layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias)
    wanted, wanted_states = lstm(TOKENS)
    with ShapesAlone():
        got, got_states = lstm(TOKENS)
    assert [got.shape, *(s.shape for s in got_states)] == [wanted.shape, *(s.shape for s in wanted_states)]
    assert not torch.equal(got, wanted), "it was computed"


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("make", [lambda: nn.LSTM(6, 4, proj_size=2), lambda: nn.GRU(6, 4)], ids=["projected", "GRU"])
def test_other_recurrent_layers_are_computed(make):
    layer = make()
    wanted = layer(TOKENS)[0]
    with ShapesAlone():
        assert torch.equal(layer(TOKENS)[0], wanted)


def test_packed_sequences_are_computed():
    lstm, packed = nn.LSTM(6, 4), nn.utils.rnn.pack_sequence([torch.randn(3, 6), torch.randn(2, 6)])
    wanted = lstm(packed)[0].data
    with ShapesAlone():
        assert torch.equal(lstm(packed)[0].data, wanted)


def test_in_training_gradients_pass_an_lstm_and_nothing_else_is_answered():
    x = TOKENS.clone().requires_grad_()
    with ShapesAlone(trains=True):
        y = F.relu(nn.LSTM(6, 4)(x)[0])
    y.sum().backward()
    assert x.grad is not None
    assert (y >= 0).all()

"""A forward pass that is after shapes alone agrees with torch: on shapes, and on what does not fit."""

import pytest
import torch
import torch.nn.functional as F

from dpm_cli.graph.shapes import ANSWERS, ShapesAlone

IMAGES, TOKENS = torch.randn(2, 6, 5, 5), torch.randn(2, 7, 6)
SIX, SEVEN, MATRIX = torch.rand(6), torch.rand(7), torch.randn(9, 6)
WITH_WEIGHTS = {
    F.batch_norm: lambda: F.batch_norm(IMAGES, running_mean=SIX, running_var=SIX, weight=SIX, bias=SIX),
    F.layer_norm: lambda: F.layer_norm(TOKENS, normalized_shape=(6,), weight=SIX, bias=SIX),
    F.linear: lambda: F.linear(TOKENS, weight=MATRIX, bias=MATRIX[:, 0]),
}
MISFITS = {
    "statistics": lambda: F.batch_norm(IMAGES, SEVEN, SEVEN, SIX, SIX),
    "weights of a batch norm": lambda: F.batch_norm(IMAGES, SIX, SIX, SEVEN, SIX),
    "axes of a layer norm": lambda: F.layer_norm(TOKENS, (7,), SEVEN, SEVEN),
    "weights of a layer norm": lambda: F.layer_norm(TOKENS, (6,), SEVEN, SEVEN),
    "columns": lambda: F.linear(IMAGES, MATRIX),
    "bias": lambda: F.linear(TOKENS, MATRIX, SEVEN),
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
    with pytest.raises(RuntimeError) as wanted:
        call()
    with ShapesAlone(), pytest.raises(RuntimeError) as got:
        call()
    assert str(got.value) == str(wanted.value)

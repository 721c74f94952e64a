"""Gradients and optimizer state with the strides of their parameters."""

import torch
from torch import nn

from dpm_cli.engine.layout import lay_out_gradients_, lay_out_like, lay_out_state_


def test_tensor_that_differs_along_axes_of_length_one_is_only_viewed() -> None:
    pixels = torch.randn(8, 4, 1, 1)
    like = torch.empty_strided((8, 4, 1, 1), (4, 1, 4, 4))
    laid = lay_out_like(pixels, like)
    assert laid.stride() == like.stride()
    assert laid.data_ptr() == pixels.data_ptr()
    assert torch.equal(laid, pixels)


def test_other_layout_is_copied_with_the_same_values() -> None:
    contiguous = torch.randn(8, 4, 3, 3)
    like = torch.empty(8, 4, 3, 3).to(memory_format=torch.channels_last)
    laid = lay_out_like(contiguous, like)
    assert laid.stride() == like.stride()
    assert torch.equal(laid, contiguous)
    assert lay_out_like(contiguous, torch.empty(8, 4, 3, 3)) is contiguous


def test_gradients_and_momentum_follow_their_parameters() -> None:
    layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer.weight.grad = torch.randn(8, 4, 3, 3)
    before = layer.weight.grad.clone()
    lay_out_gradients_(optimizer)
    assert layer.weight.grad.stride() == layer.weight.stride()
    assert torch.equal(layer.weight.grad, before)
    optimizer.state[layer.weight]["momentum_buffer"] = torch.randn(8, 4, 3, 3)
    lay_out_state_(optimizer)
    assert optimizer.state[layer.weight]["momentum_buffer"].stride() == layer.weight.stride()

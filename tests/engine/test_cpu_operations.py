import copy

import pytest
import torch
from torch import nn

from dpm_cli.engine.cpu_operations import FasterOnCpu, _fold_of, _FoldedBatchNorm

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}  # relative to the largest value


def trained(norm, images, gradient):
    """Outputs, gradients and statistics after one step of a norm, between operations that need not keep theirs."""
    images = images.detach().requires_grad_()
    outputs = torch.relu_(norm(2 * images))
    outputs.backward(gradient)
    return [outputs, images.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def lay_out(shape, dtype):
    return (1.5 * torch.randn(shape) + 0.7).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(8, 8, 4, 4), (6, 12, 8, 8), (4, 24, 5, 4), (16, 13, 3, 7), (32, 40, 1, 3)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_narrow_batch_norm_gives_what_the_usual_one_gives(shape, dtype, momentum):
    torch.manual_seed(0)
    images, gradient = lay_out(shape, dtype), lay_out(shape, dtype)
    assert _fold_of(images) > 1
    usual = nn.BatchNorm2d(shape[1], momentum=momentum)
    nn.init.uniform_(usual.weight, 0.5, 2)
    nn.init.normal_(usual.bias)
    faster = copy.deepcopy(usual)
    for step in range(2):
        expected = trained(usual, images + step, gradient)
        with FasterOnCpu():
            found = trained(faster, images + step, gradient)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert one.stride() == other.stride()
            scale = other.detach().abs().max().item()
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype] * scale)
    assert faster.num_batches_tracked == 2


def test_gradient_of_the_folded_batch_norm_is_that_of_finite_differences():
    torch.manual_seed(0)
    images = torch.randn(4, 2, 3, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(2, 2, dtype=torch.float64).unbind()
    inputs = [tensor.requires_grad_() for tensor in (images, weight.clone(), bias.clone())]
    assert torch.autograd.gradcheck(lambda *tensors: _FoldedBatchNorm.apply(*tensors, 1e-5, 8)[0], inputs)


@pytest.mark.parametrize(
    "images",
    [
        torch.randn(8, 16, 4, 4).contiguous(memory_format=torch.channels_last),  # whole cache lines
        torch.randn(8, 8, 4, 4),  # not channels last
        torch.randn(1, 8, 3, 3).contiguous(memory_format=torch.channels_last),  # 9 pixels cannot be folded
        torch.randn(8, 8),
        torch.randn(8, 8, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last),
    ],
    ids=lambda images: str(tuple(images.shape)),
)
def test_others_are_computed_as_ever(images):
    assert _fold_of(images) == 1
    norm = (nn.BatchNorm2d if images.dim() == 4 else nn.BatchNorm1d)(images.shape[1]).to(images.dtype)
    expected = copy.deepcopy(norm)(images)
    with FasterOnCpu():
        assert torch.equal(norm(images), expected)


def test_evaluation_and_norms_without_weights_are_computed_as_ever():
    images = torch.randn(8, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    for norm in (nn.BatchNorm2d(8).eval(), nn.BatchNorm2d(8, affine=False)):
        expected = copy.deepcopy(norm)(images)
        with FasterOnCpu():
            assert torch.equal(norm(images), expected)

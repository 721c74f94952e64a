"""Check that a file computes what the module computes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dpm_cli.errors import RunError, one_line
from dpm_cli.layers.outputs import output_tensors, relative_difference

BATCHES = (1, 5)  # exporters like to freeze the batch they were shown, which is 2
Answer = tuple[Tensor, list[Tensor]]  # images (B, C, H, W), and every output of the module for them


def answers(module: nn.Module, image: Tensor) -> list[Answer]:
    """Run a module on `image` (1, C, H, W), on its negative, and on normalised noise in several batch sizes.

    The negative sends a model that branches on its values down the other branch, which tracing would have lost.
    Raises RunError if the module does not run on them, or if its outputs are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(batch, *image.shape[1:], generator=generator) for batch in BATCHES]
    return [(images, _answer(module, images)) for images in (image, -image, *noise)]


def largest_difference(expected: Sequence[Answer], outputs: Callable[[Tensor], list[Tensor]]) -> float:
    """Return the largest |a - b| / max(1, max|a|) over all images and outputs; a is expected, b comes from `outputs`.

    Raises RunError if they do not even agree in number and shape.
    """
    largest = 0.0
    for images, wanted in expected:
        got = outputs(images)
        if len(images) == 1 and len(got) == len(wanted):
            got = [_squeezed(output, like) for output, like in zip(got, wanted)]
        shapes, expected_shapes = ([tuple(output.shape) for output in each] for each in (got, wanted))
        if shapes != expected_shapes:
            raise RunError(f"at batch {len(images)} the outputs have shapes {shapes}, the model's {expected_shapes}")
        wanted, got = ([output.double() for output in each] for each in (wanted, got))
        largest = max(largest, relative_difference(wanted, got, least=1.0))
    return largest


def _squeezed(output: Tensor, like: Tensor) -> Tensor:
    """Drop the axis of a batch of one, if the model's own `squeeze()` does, which files for any batch rightly keep."""
    return output[0] if tuple(output.shape) == (1, *like.shape) else output


def _answer(module: nn.Module, images: Tensor) -> list[Tensor]:
    """Run the module. Raises RunError unless all outputs are finite tensors."""
    try:
        with torch.no_grad():
            outputs = [output.clone() for output in output_tensors(module(images))]
    except Exception as error:  # a model of the user's, on a shape of the user's
        raise RunError(
            f"the model fails on images of shape {tuple(images.shape)}: {one_line(error, root_cause=True)}"
        ) from error
    if not outputs:
        raise RunError("the model returns no tensor")
    if not all(output.isfinite().all() for output in outputs):
        raise RunError(f"the model's outputs for images of shape {tuple(images.shape)} are not finite")
    return outputs

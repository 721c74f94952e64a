"""Check that a module runs on an image, and that two modules compute the same."""

import copy
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpm_cli.errors import one_line
from dpm_cli.layers.images import Shape
from dpm_cli.layers.modes import in_mode
from dpm_cli.layers.outputs import relative_difference
from dpm_cli.models.structure import named_tensors

LARGE_IMAGE = 3 * 512 * 512  # numbers; smaller images are not looked into
LARGE_TENSOR = 1 << 25  # numbers: 128 MB
MOST_TIMES = 64  # numbers of one layer's output per number in the file


def run_once(module: nn.Module, images: Tensor) -> Tensor:
    """Run a module in eval mode without gradients; every layer keeps its mode. Raises what the module raises."""
    with in_mode(module, training=False), torch.no_grad():
        outputs = module(images)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"its forward returns a {type(outputs).__name__}, not one tensor of logits")
    return outputs


def sample_images(module: nn.Module, shape: Shape, count: int = 2) -> Tensor:
    """Make random images (count, C, H, W) on the module's device and in its dtype; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *shape, generator=generator)
    weight = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), images)
    return images.to(weight)


def find_failure(module: nn.Module, shape: Shape, classes: int) -> str | None:
    """Say in one line why a module does not give one logit per class for one image; None if it does.

    Code with a `squeeze()` may take the axis of a batch of one, too, if it gives a row per image to two.
    """
    try:
        outputs = run_once(module, sample_images(module, shape, count=1))
        if outputs.shape == (classes,):
            outputs = run_once(module, sample_images(module, shape, count=2))[:1]
    except Exception as error:  # any operator may refuse the size of the image or of a weight
        return f"it does not run on an image of {list(shape)} ({one_line(error)})"
    if outputs.shape != (1, classes):
        return f"one image gives outputs {list(outputs.shape)}, not {[1, classes]}"
    return None


def find_excess(module: nn.Module, shape: Shape) -> str | None:
    """Say in one line why an image would take far more memory than the module itself; None if it would not.

    Nothing is computed. A small file can name any size of image.
    """
    if prod(shape) <= LARGE_IMAGE:
        return None
    without_data: dict[int, Any] = {id(tensor): tensor.to("meta") for _, tensor in named_tensors(module)}
    for parameter in module.parameters():
        without_data[id(parameter)] = nn.Parameter(without_data[id(parameter)], parameter.requires_grad)
    largest = _Largest()  # type: ignore[no-untyped-call]
    try:
        with largest:
            run_once(copy.deepcopy(module, without_data), torch.empty(1, *shape, device="meta"))
    except Exception as error:  # any operator may refuse the size of the image
        return f"it does not run on an image of {list(shape)} ({one_line(error)})"
    numbers = sum(tensor.numel() for _, tensor in named_tensors(module))
    if largest.numbers <= max(LARGE_TENSOR, MOST_TIMES * numbers):
        return None
    return f"an image of {list(shape)} gives {largest.numbers:,} numbers in one layer, and the file holds {numbers:,}"


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not say what it takes
    """Notes how many numbers the largest tensor holds that any operator returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def compare(module: nn.Module, other: nn.Module, shape: Shape) -> float:
    """Return the relative difference of two modules' logits for the same random images; both on the same device."""
    images = sample_images(module, shape)
    outputs, others = run_once(module, images).double(), run_once(other, images).double()  # (2, classes)
    return relative_difference([outputs], [others], least=1e-30)

"""Check that a module runs on an image, and that two modules compute the same."""

import torch
from torch import Tensor, nn

from dpm_cli.errors import one_line
from dpm_cli.layers.images import Shape
from dpm_cli.layers.modes import in_mode
from dpm_cli.layers.outputs import relative_difference


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
    """Say in one line why a module does not give one logit per class for one image; None if it does."""
    try:
        outputs = run_once(module, sample_images(module, shape, count=1))
    except Exception as error:  # any operator may refuse the size of the image or of a weight
        return f"it does not run on an image of {list(shape)} ({one_line(error)})"
    if outputs.shape != (1, classes):
        return f"one image gives outputs {list(outputs.shape)}, not {[1, classes]}"
    return None


def compare(module: nn.Module, other: nn.Module, shape: Shape) -> float:
    """Return the relative difference of two modules' logits for the same random images; both on the same device."""
    images = sample_images(module, shape)
    outputs, others = run_once(module, images).double(), run_once(other, images).double()  # (2, classes)
    return relative_difference([outputs], [others], least=1e-30)

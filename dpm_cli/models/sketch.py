"""Build an architecture without the memory of its weights, to compare a file with it before anything is allocated."""

from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dpm_cli.errors import RecipeError
from dpm_cli.layers.images import Shape
from dpm_cli.models.zoo import build
from dpm_cli.recipe.code import is_own_code

LARGE = 1 << 18  # numbers in a tensor; smaller ones are made as usual, since constructors compute with them
MAKERS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)


def sketch(arch: str, *, classes: int, shape: Shape) -> nn.Module | None:
    """Build an architecture with its large tensors on the meta device, in training mode.

    Returns None for code of the user's own, which may do anything, and for constructors that read large tensors.
    Raises RecipeError for an architecture that does not exist.
    """
    if is_own_code(arch):
        return None
    with torch.random.fork_rng(devices=[]):  # the caller's random state must not change
        try:
            with _LargeOnMeta():
                return build(arch, classes=classes, shape=shape)
        except RecipeError as error:
            if isinstance(error.__context__, NotImplementedError):  # "cannot copy out of meta tensor"
                return None
            raise


class _LargeOnMeta(TorchFunctionMode):
    """Makes large tensors on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS and kwargs.get("device") is None and _count(args, kwargs) >= LARGE:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _count(args: Any, kwargs: Any) -> int:
    """Count the numbers of the tensor that a call asks for, given as f(2, 3), f((2, 3)) or f(size=(2, 3))."""
    size = kwargs.get("size", args)
    if len(size) == 1 and not isinstance(size[0], int):
        (size,) = size
    try:
        return prod(size)
    except TypeError:
        return 0

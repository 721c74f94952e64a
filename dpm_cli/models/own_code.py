"""Build a module with the user's own code: import `package.module:function` and call it."""

import re

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from dpm_cli.errors import RecipeError, one_line
from dpm_cli.layers.images import Shape
from dpm_cli.layers.modes import in_mode
from dpm_cli.recipe.code import call_own_code


def build_from_own_code(arch: str, *, classes: int, shape: Shape) -> nn.Module:
    """Import `package.module` (the current folder counts) and call `function`.

    It is called without arguments, or with the number of classes if it has a parameter `num_classes` or `classes`.
    This runs code, so `arch` must come from the user or from a recipe that the user trusts (`require_trust`), never
    from a model file. Lazy layers get their sizes from an image of this shape. Raises RecipeError.
    """
    if re.fullmatch(r"((?:\w+\.)*\w+):(\w+)", arch) is None:
        raise RecipeError(
            f"model.arch is {arch!r}; known forms: NAME, torchvision:NAME, timm:NAME, package.module:function"
        )
    module = call_own_code("model.arch", arch, {"num_classes": classes, "classes": classes})
    if not isinstance(module, nn.Module):
        raise RecipeError(f"model.arch {arch!r} returned a {type(module).__name__}; it must return a torch.nn.Module")
    if any(isinstance(layer, LazyModuleMixin) for layer in module.modules()):
        try:
            with in_mode(module, training=False), torch.no_grad():
                module(torch.zeros(2, *shape))
        except Exception as error:  # the user's module may raise anything
            raise RecipeError(
                f"model.arch {arch!r} has lazy layers and does not run on images of {list(shape)} ({one_line(error)})"
            ) from None
    return module

"""Build a module with the user's own code: import `package.module:function` and call it."""

import contextlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from dpm_cli.errors import RecipeError, one_line

CLASSES_PARAMETERS = ("num_classes", "classes")


def build_from_own_code(arch: str, *, classes: int) -> nn.Module:
    """Import `package.module` (the current folder counts) and call `function`.

    It is called without arguments, or with the number of classes if it has a parameter `num_classes` or `classes`.
    This runs code, so `arch` must come from the user or from a recipe that the user trusts (`require_trust`), never
    from a model file. Raises RecipeError.
    """
    match = re.fullmatch(r"((?:\w+\.)*\w+):(\w+)", arch)
    if match is None:
        raise RecipeError(
            f"model.arch is {arch!r}; known forms: NAME, torchvision:NAME, timm:NAME, package.module:function"
        )
    module_name, function_name = match.groups()
    with current_folder_importable():
        function = _find(arch, module_name, function_name)
        try:
            module = function(**_arguments(function, classes))
        except (Exception, SystemExit) as error:  # the user's function may raise anything
            raise RecipeError(f"model.arch {arch!r}: calling it failed: {one_line(error)}") from None
    if not isinstance(module, nn.Module):
        raise RecipeError(f"model.arch {arch!r} returned a {type(module).__name__}; it must return a torch.nn.Module")
    return module


@contextlib.contextmanager
def current_folder_importable() -> Iterator[None]:
    """Temporarily search the current folder first, as `python -m` does and a console script does not."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the imported code may have changed the path itself
            sys.path.remove(folder)


def _find(arch: str, module_name: str, function_name: str) -> Any:
    """Import the function. Raises RecipeError if that fails."""
    try:
        importlib.invalidate_caches()  # a file written a moment ago is found
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RecipeError(f"model.arch {arch!r}: no module {error.name!r} in {os.getcwd()} or on sys.path") from None
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        raise RecipeError(f"model.arch {arch!r}: importing {module_name} failed: {one_line(error)}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RecipeError(f"model.arch {arch!r}: {module_name} has no function {function_name!r}")
    return function


def _arguments(function: Any, classes: int) -> dict[str, int]:
    try:
        parameters = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some functions written in C do not say what they take
        return {}
    return {name: classes for name in CLASSES_PARAMETERS if name in parameters}

"""Find the code that a recipe would run, ask for trust before it does, and import it."""

import contextlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dpm_cli.errors import RecipeError, listing, one_line

if TYPE_CHECKING:
    from dpm_cli.recipe.schema import Recipe


def is_own_code(name: str) -> bool:
    """Tell whether a name is `package.module:function`: code that neither dpm nor one of its dependencies ships."""
    source, colon, _ = name.partition(":")
    return bool(colon) and source not in ("torchvision", "timm")


def require_trust(recipe: "Recipe", *, trust: bool) -> None:
    """Refuse a recipe that names code, unless it is trusted or the user has typed that name. Raises RecipeError."""
    if trust or not (code := recipe.code_to_trust):
        return
    named = listing(f"{setting}: {name}" for setting, name in code.items())
    typed = " ".join(f"--set {setting}={name}" for setting, name in code.items())
    raise RecipeError(
        f"the recipe names code that would run ({named}): --trust (in Python trust=True) if you trust whoever wrote "
        f"both, or name it yourself, {typed}"
    )


def call_own_code(setting: str, name: str, arguments: Mapping[str, Any]) -> Any:
    """Import `package.module` (the current folder counts), call `function` and return what it returns.

    It gets those of the `arguments` that it has parameters for. This runs code, so `name` must come from the user or
    from a recipe that the user trusts (`require_trust`), never from a model file. setting: that holds `name`, for
    messages. Raises RecipeError.
    """
    match = re.fullmatch(r"((?:\w+\.)*\w+):(\w+)", name)
    if match is None:
        raise RecipeError(f"{setting} is {name!r}; code is named as package.module:function")
    with current_folder_importable():
        function = _find(f"{setting} {name!r}", *match.groups())
        try:
            return function(**_choose(function, arguments))
        except (Exception, SystemExit) as error:  # the user's function may raise anything
            raise RecipeError(f"{setting} {name!r}: calling it failed: {one_line(error)}") from None


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


def _find(what: str, module_name: str, function_name: str) -> Any:
    """Import the function. Raises RecipeError if that fails."""
    try:
        importlib.invalidate_caches()  # a file written a moment ago is found
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RecipeError(f"{what}: no module {error.name!r} in {os.getcwd()} or on sys.path") from None
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        raise RecipeError(f"{what}: importing {module_name} failed: {one_line(error)}") from None
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise RecipeError(f"{what}: {module_name} has no function {function_name!r}")
    return function


def _choose(function: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the arguments that a function has parameters for."""
    try:
        parameters = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some functions written in C do not say what they take
        return {}
    return {name: value for name, value in arguments.items() if name in parameters}

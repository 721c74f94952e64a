"""Find the code that a recipe would run, and ask for trust before it does."""

from typing import TYPE_CHECKING

from dpm_cli.errors import RecipeError, listing

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

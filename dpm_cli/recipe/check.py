"""Explain mistakes in settings, one line each, with the place, the value and the nearest known key."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dpm_cli.errors import RecipeError
from dpm_cli.recipe.values import Section

S = TypeVar("S", bound=Section)


def check_section(kind: type[S], values: Mapping[str, Any], name: str) -> S:
    """Build one section from plain values. Raises RecipeError that names every mistake as `name.key`.

    >>> check_section(Decay, {"steps": 50}, "decay").steps
    50
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError([f"{name}: {problem}" for problem in explain(error, kind)]) from None


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Write one line per mistake in a section or recipe of type `root`: where, what, and the nearest known key."""
    return [_explain_one(problem, root) for problem in error.errors(include_url=False)]


def _explain_one(problem: Any, root: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "recipe"
    value = problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            known = _keys_at(problem["loc"][:-1], root)
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            way_out = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            return f"unknown key {place!r}; {way_out}"
        case "missing":
            return f"{place!r} is missing"
        case "literal_error":
            expected = problem["ctx"]["expected"].replace(" or ", ", ")
            return f"{place} is {_show(value)}; known: {expected}"
        case "value_error":
            shown = f" is {_show(value)};" if isinstance(value, str | int | float) else ""
            return f"{place}{shown} {problem['ctx']['error']}"
        case _:
            return f"{place} is {_show(value)}; {problem['msg'].lower()}"


def _show(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to print numbers of thousands of digits
        return "a number of thousands of digits"
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _keys_at(path: Sequence[str | int], root: type[BaseModel]) -> list[str]:
    """Return the known keys of the section at a path such as ("train",)."""
    section = root
    for part in path:
        field = section.model_fields.get(str(part))
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
    return list(section.model_fields)

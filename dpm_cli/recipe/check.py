"""Explain mistakes in settings, one line each, with the place, the value and the nearest known key."""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dpm_cli.errors import RecipeError
from dpm_cli.recipe.values import Section

S = TypeVar("S", bound=Section)
SHOWN = 3  # places that a message names


def check_section(kind: type[S], values: Mapping[str, Any], name: str) -> S:
    """Build one section from plain values. Raises RecipeError that names every mistake as `name.key`.

    >>> check_section(Decay, {"steps": 50}, "decay").steps
    50
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(explain(error, kind, name)) from None


def explain(
    error: ValidationError, root: type[BaseModel], name: str, typed: Collection[str] = frozenset()
) -> list[str]:
    """Write one line per mistake in a section or recipe of type `root`: where, what, and the nearest known key.

    name: of what holds the values. typed: settings that do not come from there, as the user typed them.
    """
    return [
        ("" if _is_among(problem["loc"], typed) else f"{name}: ") + _explain_one(problem, root)
        for problem in error.errors(include_url=False)
    ]


def _is_among(path: Sequence[str | int], settings: Collection[str]) -> bool:
    return any(".".join(map(str, path[:length])) in settings for length in range(1, len(path) + 1))


def _explain_one(problem: Any, root: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "recipe"
    value = problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {place!r}; {_nearest(problem['loc'], root)}"
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


def _nearest(path: Sequence[str | int], root: type[BaseModel]) -> str:
    """Name the key that was meant: of that name in another section, else a similar one here, else one elsewhere."""
    key, here = str(path[-1]), _keys_at(path[:-1], root)
    everywhere = [".".join(parts) for parts in _all_keys(root)]
    same = [each for each in everywhere if each.rpartition(".")[2] == key]
    if same:
        return f"did you mean {' or '.join(repr(each) for each in same[:SHOWN])}?"
    leaves = {each.rpartition(".")[2]: each for each in reversed(everywhere)}
    if best := difflib.get_close_matches(key, {*leaves, *here}, n=1, cutoff=0.9):
        return f"did you mean {(best[0] if best[0] in here else leaves[best[0]])!r}?"
    near = difflib.get_close_matches(key, here, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(here)}"


def _all_keys(section: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Yield the path of every setting that is no section itself."""
    for name, field in section.model_fields.items():
        inner = find_section(field.annotation)
        if inner is None:
            yield (name,)
        else:
            yield from ((name, *rest) for rest in _all_keys(inner))


def find_section(annotation: Any) -> type[BaseModel] | None:
    """Find the section in the type of a field, such as `Training | None`."""
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


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
        section = (find_section(field.annotation) if field else None) or section
    return list(section.model_fields)

"""One line of whatever foreign code raised, and lists that do not grow with the number of names."""

import pytest

from dpm_cli.errors import listing, one_line


@pytest.mark.parametrize(
    ("names", "listed"),
    [([], ""), (["a"], "a"), (["a", "b", "c"], "a, b, c"), (["a", "b", "c", "d", "e"], "a, b, c and 2 more")],
)
def test_listing_counts_what_it_does_not_show(names: list[str], listed: str) -> None:
    assert listing(names) == listing(iter(names)) == listed


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\n\n  two"), "ValueError: one two"),
        (KeyError("absent"), "KeyError: 'absent'"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("x" * 1000), "ValueError: " + "x" * 200),
    ],
)
def test_an_exception_is_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


def test_the_root_cause_is_the_first_line_of_the_first_exception() -> None:
    error = RuntimeError("pages of advice")
    error.__cause__ = ValueError("\n the reason\nadvice")
    assert one_line(error, root_cause=True) == "ValueError: the reason"
    assert one_line(error) == "RuntimeError: pages of advice"

"""Numbers and lists as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpm_cli.display import numbers


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 K"),
        (77_300, "77.3 K"),
        (125_747_584, "125.7 M"),
        (4_089_184_256, "4.09 G"),
        (999_960, "1.00 M"),
        (None, "–"),
    ],
)
def test_counts_have_the_suffixes_of_recipes(number: int | None, text: str) -> None:
    assert numbers.count(number) == text


@given(st.integers(1, 10**14))
def test_counts_keep_three_digits(number: int) -> None:
    value, _, suffix = numbers.count(number).partition(" ")
    scale = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[suffix]
    assert float(value) * scale == pytest.approx(number, rel=0.0051)
    assert len(value) <= 6


def test_units_are_counted_and_costs_rounded() -> None:
    assert numbers.cost("channels", 1120) == "1120"
    assert numbers.cost("params", 1120) == "1.12 K"


@pytest.mark.parametrize(
    ("dense", "slim", "text"),
    [(100, 47, "−53.0 %  2.13×"), (100, 100, "0.0 %  1.00×"), (100, 125, "+25.0 %  0.80×"), (100, 0, "–")],
)
def test_a_cost_changes_by_percent_and_by_a_factor(dense: float, slim: float, text: str) -> None:
    assert numbers.cost_change(dense, slim) == text


def test_accuracy_changes_by_points() -> None:
    assert numbers.points_change(93.53, 93.10) == "−0.43 points"
    assert numbers.points_change(93.10, 93.53) == "+0.43 points"
    assert numbers.points_change(93.1, 93.1) == "0.00 points"
    assert numbers.points_change(None, 93.1) == "–"


def test_latency_changes_by_a_factor_with_its_direction() -> None:
    assert numbers.speed_change(3.0, 2.0) == "1.50× faster"
    assert numbers.speed_change(2.0, 3.0) == "1.50× slower"
    assert numbers.speed_change(1.0, 1.004) == numbers.speed_change(1.004, 1.0) == "as fast"


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (750, "12 min 30 s"), (11_101, "3 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.1234, "0.123 ms"), (5.678, "5.68 ms"), (123.4, "123 ms"), (None, "–")])
def test_milliseconds_have_three_digits(value: float | None, text: str) -> None:
    assert numbers.milliseconds(value) == text


def test_agreement_is_exact_or_a_power_of_ten() -> None:
    assert numbers.agreement(0.0) == "exactly"
    assert numbers.agreement(3.14e-7) == "to 3e-07"

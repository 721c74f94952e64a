"""How far two models' outputs are apart."""

import math

import pytest
import torch

from dpm_cli.layers.outputs import output_tensors, relative_difference

ONE = torch.tensor([1.0, -4.0])


@pytest.mark.parametrize(
    ("outputs", "others", "difference"),
    [
        ([ONE], [ONE], 0.0),
        ([ONE], [torch.tensor([1.0, -3.0])], 1 / 4),
        ([ONE, ONE / 100], [ONE, torch.tensor([0.01, -0.02])], 1 / 2),
        ([ONE * 0], [ONE * 0 + 1e-7], 0.1),
        ([], [], 0.0),
        ([torch.zeros(0)], [torch.zeros(0)], 0.0),
        ([ONE], [torch.ones(3)], math.inf),
        ([ONE], [ONE, ONE], math.inf),
        ([ONE, ONE], [ONE, ONE * math.nan], math.inf),
        ([ONE * math.inf], [ONE * math.inf], math.inf),
    ],
)
def test_difference_is_relative_to_the_largest_output(outputs, others, difference):
    assert relative_difference(outputs, others) == pytest.approx(difference)


def test_outputs_are_listed_in_order():
    assert [float(each) for each in output_tensors({"b": torch.tensor(1), "a": (torch.tensor(2), "c")})] == [1, 2]

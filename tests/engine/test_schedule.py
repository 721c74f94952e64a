import math

import pytest
import torch
from torch import nn

from dpm_cli.engine.optimizer import make_optimizer
from dpm_cli.engine.schedule import learning_rate, set_learning_rate_
from dpm_cli.recipe import Training

STAGE = {"steps": 1000, "steps_per_epoch": 10}


def stage(**settings):
    return Training(**{"epochs": 100, "lr": 0.4} | settings)


def test_cosine_starts_full_is_half_at_half_and_ends_at_zero():
    values = [learning_rate(step, stage(schedule="cosine"), **STAGE) for step in (0, 250, 500, 1000)]
    assert values == pytest.approx([0.4, 0.4 * (1 + math.sqrt(0.5)) / 2, 0.2, 0.0], abs=1e-15)


def test_warmup_is_linear_and_cosine_spans_the_rest():
    training = stage(schedule="cosine", warmup_epochs=2)
    rates = [learning_rate(step, training, **STAGE) for step in range(1001)]
    assert rates[:20] == pytest.approx([0.4 * (step + 1) / 20 for step in range(20)])
    assert max(rates) == rates[20] == rates[19] == 0.4
    assert rates[20 + 490] == pytest.approx(0.2)
    assert rates[1000] == pytest.approx(0, abs=1e-15)


def test_a_fraction_of_an_epoch_warms_up():
    training = stage(schedule="constant", warmup_epochs=0.5)
    assert learning_rate(0, training, **STAGE) == pytest.approx(0.4 / 5)


def test_triangular_is_that_of_gate_decorator():
    """From 1e-3 up to 1e-2 at half of the stage and back, straight in between."""
    training = stage(lr=0.01, schedule="triangular", gamma=0.1)
    rates = [learning_rate(step, training, **STAGE) for step in (0, 250, 500, 750, 1000)]
    assert rates == pytest.approx([1e-3, 5.5e-3, 1e-2, 5.5e-3, 1e-3])


def test_step_counts_epochs():
    training = stage(schedule="step", step_size=30, gamma=0.1)
    rates = [learning_rate(step, training, **STAGE) for step in (299, 300, 599, 900)]
    assert rates == pytest.approx([0.4, 0.04, 0.04, 0.0004])


def test_multistep_counts_fractions_of_the_stage():
    training = stage(schedule="multistep", milestones=(0.6, 0.8), gamma=0.1)
    rates = [learning_rate(step, training, **STAGE) for step in (599, 600, 799, 800, 999)]
    assert rates == pytest.approx([0.4, 0.04, 0.04, 0.004, 0.004])


def test_a_stage_of_only_warmup_does_not_divide_by_zero():
    training = stage(lr=1, schedule="cosine").model_copy(update={"epochs": 1, "warmup_epochs": 1})  # no recipe has it
    assert learning_rate(5, training, steps=5, steps_per_epoch=5) == 1


def test_the_rate_reaches_the_optimizer():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(layer, stage(lr=1.0, momentum=0, weight_decay=0))
    set_learning_rate_(optimizer, 0.25)
    layer.weight.grad = torch.ones(1, 1)
    before = layer.weight.item()
    optimizer.step()
    assert before - layer.weight.item() == pytest.approx(0.25)

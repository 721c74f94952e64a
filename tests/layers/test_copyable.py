import copy
import warnings

import torch
from torch import nn

from dpm_cli.jobs.starting import load_start
from dpm_cli.layers.copyable import keep_copyable_
from dpm_cli.recipe import Recipe


def weight_normed() -> nn.Module:
    """As networks of many repositories are still built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrap = nn.utils.weight_norm
        return nn.Sequential(wrap(nn.Conv2d(1, 6, 3)), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(216, 10)))


def test_a_model_that_computes_its_weights_is_copied_after_every_step():
    model = keep_copyable_(weight_normed())
    images = torch.randn(2, 1, 8, 8)
    model(images).sum().backward()
    other = copy.deepcopy(model)
    other(images).sum().backward()
    assert other[0].weight_g.grad.abs().max() > 0
    assert torch.equal(copy.deepcopy(other)(images), model(images))


def test_a_job_starts_from_a_model_that_computes_its_weights():
    model = weight_normed()
    recipe = Recipe.model_validate(
        {
            "model": {"arch": "test_copyable:weight_normed", "classes": 10, "input": [1, 8, 8]},
            "data": {"name": "digits"},
            "prune": {"target": {"macs": 0.5}},
        }
    )
    start = load_start(model, recipe, trust=True)
    assert start.arch == "test_copyable:weight_normed"
    start.module.train()(torch.randn(2, 1, 8, 8)).sum().backward()
    copy.deepcopy(start.module)

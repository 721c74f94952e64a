"""Whole runs of models whose tensors are not those of plain images: what a run does after training holds for them."""

from functools import partial
from pathlib import Path

import pytest
import torch
from digits_recipe import recipe
from torch import nn

import dpm_cli
from dpm_cli.data import load_data
from dpm_cli.engine.evaluate import evaluate_module
from dpm_cli.errors import RecipeError
from dpm_cli.measure import measure_in_turns
from dpm_cli.models import build
from dpm_cli.recipe.sections import Data


@pytest.fixture(autouse=True)
def _short_latencies(monkeypatch):
    monkeypatch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))


class Frames(nn.Module):
    """Sees the rows of a picture as frames."""

    def __init__(self):
        super().__init__()
        self.flat, self.deep = nn.Conv2d(1, 8, 3, padding=1), nn.Conv3d(8, 12, (3, 3, 1), padding=(1, 1, 0))
        self.norm, self.head = nn.BatchNorm3d(12), nn.Linear(12, 10)

    def forward(self, x):
        x = self.flat(x).relu().unsqueeze(-1)
        return self.head(self.norm(self.deep(x.transpose(2, 3))).relu().mean((2, 3, 4)))


class Lines(nn.Module):
    """Sees a picture as one long line."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 12, 3)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.last(self.norm(self.first(x.flatten(2))).relu()).relu().mean(2))


class Squeezes(nn.Module):
    """Drops all axes of size 1, also that of a batch of one."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).relu().mean((2, 3), keepdim=True).squeeze())


class Lazy(nn.Module):
    """Gets its sizes from its first image."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.LazyConv2d(12, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(10)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).relu().flatten(1))


def test_lazy_layers_of_ones_own_code_get_their_sizes_wherever_it_is_built(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model = {"arch": "test_odd_models:Lazy", "classes": 10, "input": [1, 8, 8]}
    settings = recipe(model=model, prune={"target": {"macs": 0.7}, "round_to": 1}, train={"epochs": 1}, export=[])
    dpm_cli.train(settings, output=tmp_path / "model.pt", trust=True)
    report = dpm_cli.prune(tmp_path / "model.pt", settings, output=tmp_path / "out", device="cpu", trust=True)
    assert report.slim.macs <= 0.7 * report.dense.macs
    slim = dpm_cli.load(tmp_path / "out" / "slim.pt", arch="test_odd_models:Lazy", trust=True)
    assert slim.norm.num_features == slim.first.out_channels < 12
    with pytest.raises(RecipeError, match=r"has lazy layers and does not run on images of \[1, 1, 1\]"):
        build("test_odd_models:Lazy", classes=10, shape=(1, 1, 1))


@pytest.mark.parametrize(
    "kind", [Lines, *(pytest.param(kind, marks=pytest.mark.thorough) for kind in (Frames, Squeezes))]
)
def test_a_run_measures_and_delivers(kind, tmp_path):
    torch.manual_seed(0)
    settings = recipe(
        prune={"target": {"macs": 0.7}, "round_to": 1},
        train={"epochs": 2},
        export=["onnx", "torchscript"],
    )
    report = dpm_cli.prune(kind(), settings, output=tmp_path, device="cpu")
    images = torch.zeros(2, 1, 8, 8)
    assert dpm_cli.load(tmp_path / "slim.pt", model=kind())(images).shape == (2, 10)
    assert report.slim.accuracy is not None
    assert report.slim.macs <= 0.7 * report.dense.macs
    assert {each.format for each in report.exports} == {"onnx", "torchscript"}


def test_a_last_batch_of_one_counts_even_if_the_model_squeezes_it():
    splits = load_data(Data(name="digits"), shape=(1, 8, 8), classes=10, seed=0)
    three, model = splits.test.select(torch.arange(3)), Squeezes()
    score, whole = (evaluate_module(model, three, batch=batch) for batch in (2, 3))
    assert (score.images, score.accuracy) == (3, whole.accuracy)
    assert score.loss == pytest.approx(whole.loss)

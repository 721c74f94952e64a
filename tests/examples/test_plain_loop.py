"""The plain loop of examples/, and that `dpm prune` takes the same steps."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import dpm_cli
from dpm_cli.jobs.loading import load_splits
from dpm_cli.measure import flushing_denormals
from dpm_cli.models import build
from dpm_cli.recipe import parse_recipe

FILE = Path(__file__).parents[2] / "examples" / "plain_loop.py"
EPOCHS = 4


@pytest.fixture
def plain_loop(monkeypatch):
    spec = importlib.util.spec_from_file_location("plain_loop", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plain_loop", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.thorough
def test_the_example_runs_as_it_is(plain_loop, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plain_loop, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(plain_loop, "EPOCHS", (1, 4))
    plain_loop.main()
    assert "with half of the multiply-accumulates" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"slim.pt", "model.onnx", "model.json"}


@pytest.mark.thorough
@pytest.mark.parametrize("base", ["depgraph", "otov2"])
def test_the_plain_loop_and_dpm_prune_end_with_the_same_bits(plain_loop, base, tmp_path):
    recipe = parse_recipe(
        {
            "model": {"arch": "digits", "input": [1, 8, 8]},
            "data": {"name": "digits", "batch": 64, "augment": {"crop": 1, "flip": False}},
            "prune": {"base": base, "target": {"macs": 0.5}},
            "decay": {"steps": 6},
            "train": {"epochs": EPOCHS, "lr": 0.05, "schedule": "constant", "distill": 0},
            "finetune": {"epochs": 0},
            "export": [],
            "precision": "fp32",
            "recalibrate_batches": 0,
        }
    )
    torch.manual_seed(1)
    dense = build("digits", classes=10, shape=(1, 8, 8))
    dpm_cli.prune(dense, recipe, output=tmp_path, device="cpu")

    splits = load_splits(recipe, torch.device("cpu"))
    per_epoch = len(splits.train) // 64
    augment = recipe.data.augment
    batches = (
        (images.contiguous(memory_format=torch.channels_last), labels)
        for epoch in range(EPOCHS)
        for images, labels in splits.train.batches(64, seed=0, epoch=epoch, augment=augment, drop_last=True)
    )
    model = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    with flushing_denormals():
        plain_loop.prune(model, batches, epochs=EPOCHS, per_epoch=per_epoch, base=base, decay_steps=6)
    slim, found = dpm_cli.load(tmp_path / "slim.pt"), model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in slim.state_dict().items())

"""Short runs on digits, and what is left of them to compare with a loop of one's own."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dpm_cli.data import load_data
from dpm_cli.files import CHECKPOINT
from dpm_cli.jobs.loading import follow, make_setup
from dpm_cli.recipe import parse_recipe
from dpm_cli.recipe.sections import Data
from dpm_cli.run.story import Run

BATCH, PER_EPOCH = 32, 6  # 230 training images
SIZES = (8, 12)  # units of the two groups of Net


class Net(nn.Module):
    """8 units that two normalised layers share (a residual add), 12 of their own.

    No bias before a BatchNorm: its gradient is zero but for rounding, and Adam would make steps of it.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.back, self.back_norm = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.back_norm(self.back(F.relu(self.inner_norm(self.inner(x))))))
        return self.head(x.mean((2, 3)))


NORM = ("weight", "bias", "running_mean", "running_var")
AXES = {  # of every tensor, the group whose units each axis counts
    **{f"{norm}.{name}": (0,) for norm in ("norm", "back_norm") for name in NORM},
    **{f"inner_norm.{name}": (1,) for name in NORM},
    "stem.weight": (0,), "inner.weight": (1, 0), "back.weight": (0, 1), "head.weight": (None, 0),
}  # fmt: skip
ROWS = tuple(  # what makes the units of each group
    [name for name, axes in AXES.items() if axes[0] == group and not name.endswith(NORM[2:])] for group in (0, 1)
)


def make_net():
    torch.manual_seed(3)
    net = Net()
    for norm in (net.norm, net.inner_norm, net.back_norm):
        nn.init.uniform_(norm.weight, 0.3, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    net(torch.randn(64, 1, 8, 8))  # moves the running statistics
    return net.eval()


def macs(rows, inner):
    """By hand: 64 positions; stem 1→rows and inner rows→inner are 3×3, back inner→rows is 1×1."""
    return 64 * (9 * rows + 9 * rows * inner + inner * rows) + 10 * rows


def load_digits():
    return load_data(Data(name="digits", limit=230), shape=(1, 8, 8), classes=10, seed=0)


def make_recipe(*overrides):
    values = {
        "model": {"arch": "own", "input": [1, 8, 8]},
        "data": {"name": "digits", "batch": BATCH, "augment": {"crop": 1, "flip": False}},
        "prune": {"target": {"macs": 0.4}, "rounds": 2, "round_to": 1},
        "decay": {"steps": 1, "rectify": False},
        "train": {"epochs": 3, "lr": 0.05, "distill": 0},
        "finetune": {"epochs": 0},
        "export": [],
        "precision": "fp32",
        "recalibrate_batches": 0,
    }
    return parse_recipe(values, overrides)


def go(folder, recipe, splits, model=None, arch=None):
    """The whole run, its events and its report."""
    device = torch.device("cpu")
    setup = make_setup(recipe, splits, Path(folder) / CHECKPOINT, device)
    run, events = Run(recipe, setup, model or make_net(), arch=arch, output=Path(folder)), []
    return run, events, follow(run.events(), events.append)


def batches(recipe, splits, epoch):
    augment = recipe.data.augment
    return splits.train.batches(BATCH, seed=recipe.seed, epoch=epoch, augment=augment, drop_last=True)


def make_optimizer(settings, parameters):
    """As a recipe asks for it, from torch."""
    decay = {"weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, settings.lr, momentum=settings.momentum, **decay)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer](parameters, settings.lr, **decay)


def assert_same_model(run, state, dead):
    """What a run left is what a loop over the whole net left, without the dead units. dead: {(group, unit)}"""
    kept = [[unit for unit in range(size) if (group, unit) not in dead] for group, size in enumerate(SIZES)]
    stays = run.subject.pruning.ancestry.survivors
    assert [stays[:8].nonzero()[0].tolist(), stays[8:].nonzero()[0].tolist()] == kept
    found = run.subject.model.state_dict()
    for name, tensor in state.items():
        for axis, group in enumerate(AXES.get(name, ())):
            tensor = tensor if group is None else tensor.index_select(axis, torch.tensor(kept[group]))
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5)

"""Two real processes over gloo, each with its slice of a batch, against one process with the whole batch."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dpm_cli.engine.batchnorm import recalibrate_batchnorm_
from dpm_cli.engine.distributed import ALONE
from dpm_cli.engine.learner import Learner
from dpm_cli.engine.precision import Precision
from dpm_cli.recipe import Training


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3))
        self.norm, self.head, self.idle = nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.norm(self.body(x).mean((2, 3))))


def remove_channel_(model):
    """The last one of the first convolution, by hand. Returns what is kept of every parameter."""
    conv, norm, reader = model.body[0], model.body[1], model.body[3]
    reader.weight = nn.Parameter(reader.weight.detach()[:, :5].clone())
    for layer in (conv, norm):
        for name in ("weight", "bias"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[:5].clone()))
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[:5].clone())
    rows = ("body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias")
    return {**{name: {0: np.arange(5)} for name in rows}, "body.3.weight": {1: np.arange(5)}}


def train_with(world, *, steps=4, batch=7):
    """A few steps with all that couples images: BatchNorm, mix-up, clipping, a removed channel; then what came out."""
    torch.manual_seed(0)
    model = Net().train()
    training = Training(
        epochs=1, lr=0.1, schedule="constant", weight_decay=1e-3, label_smoothing=0.1, mixup=0.4, clip_grad=0.5
    )
    precision = Precision("fp32", "cpu")
    learner = Learner(model, training, precision=precision, steps_per_epoch=steps, seed=0, world=world)
    images, labels = torch.randn(steps + 2, batch, 2, 6, 6), torch.randint(3, (steps + 2, batch))
    mine = slice(batch * world.rank // world.size, batch * (world.rank + 1) // world.size)
    losses, gradients = [], []

    def watch():
        gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})

    for step in range(steps):
        if step == 2:  # as compaction does it: other parameters in the same model
            before = dict(model.named_parameters())
            learner.shrink_(before, remove_channel_(model))
        loss = learner.step_(images[step, mine], labels[step, mine], step=step, count=batch, before=[watch])
        losses.append(loss.item())
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = ((images[steps + k, mine], labels[steps + k, mine]) for k in range(2))
    recalibrate_batchnorm_(model, batches, count=2, precision=precision, world=world)
    return {"losses": losses, "gradients": gradients, "trained": trained, "settled": model.state_dict()}


SCRIPT = f"""
import sys, numpy as np, torch
from torch import nn
from dpm_cli.engine.batchnorm import recalibrate_batchnorm_
from dpm_cli.engine.distributed import join
from dpm_cli.engine.learner import Learner
from dpm_cli.engine.precision import Precision
from dpm_cli.recipe import Training

torch.set_num_threads(1)
{inspect.getsource(Net)}
{inspect.getsource(remove_channel_)}
{inspect.getsource(train_with)}
with join("cpu") as world:
    torch.save(train_with(world), f"{{sys.argv[1]}}/{{world.rank}}.pt")
"""


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.thorough
def test_slices_of_a_batch_take_the_step_of_the_whole_batch(together, tmp_path, size):
    ended = together(SCRIPT, tmp_path, size=size)
    assert [code for code, _, _ in ended] == [0] * size, ended
    made = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    alone = train_with(ALONE)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    for one in made:
        torch.testing.assert_close(one, made[0], rtol=0, atol=0)  # the same bits on all processes
        close(one, alone)
    assert made[0]["gradients"][0]["idle.weight"] is None

"""Every way to choose units, on nets that users prune: exactly to the target, compacted, saved, exported."""

from functools import cache

import numpy as np
import pytest
import torch
from small_runs import go as go_with
from small_runs import make_recipe

from dpm_cli.data import Splits
from dpm_cli.data.splits import Images
from dpm_cli.graph import find_groups
from dpm_cli.measure import count_macs
from dpm_cli.method.budget import cost_of
from dpm_cli.models import build, load_slim

NETS = ("resnet56", "vgg16_bn", "torchvision:mobilenet_v2", "torchvision:densenet121")
WAYS = {
    "group-norm": ["prune.base=depgraph"],
    **{name: [f"prune.importance={name}"] for name in ("l1", "bn-scale", "taylor", "fisher", "random")},
    "otov2": ["prune.base=otov2"],
    "otov2 by score": ["prune.base=otov2", "prune.otov2.strength=1e-9", "prune.otov2.epsilon=0"],
    "hesso": ["prune.base=otov2", "prune.otov2.variant=hesso", "decay.envelope=multiplicative"],
    "gate-decorator": ["prune.base=gate-decorator", "train.epochs=1", "decay.steps=2"],
    "fixed ticks": ["prune.base=gate-decorator", "prune.gates.fraction=0.05", "train.epochs=1", "decay.steps=2"],
}


@cache
def dense(arch):
    """A net whose outputs depend on its images, and its groups, which take longer to find than a run takes."""
    torch.manual_seed(0)
    net = build(arch, classes=10, shape=(3, 32, 32)).train()
    for _ in range(3):
        with torch.no_grad():
            net(torch.randn(16, 3, 32, 32))  # moves the running statistics
    return net.eval(), find_groups(net.eval(), torch.zeros(2, 3, 32, 32))


def synthetic(images):
    dice, flat = torch.Generator().manual_seed(images), torch.full((3,), 0.5)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=dice)
    return Images(pixels, torch.arange(images) % 10, flat, flat)


def go(folder, arch, monkeypatch, *overrides):
    """A run of a dozen steps: what it pruned, and its report."""
    net, groups = dense(arch)
    monkeypatch.setattr("dpm_cli.method.survey.find_groups", lambda *_, **settings: groups)
    recipe = make_recipe(
        f"model.arch={arch}", "model.input=[3, 32, 32]", "data.batch=4", "prune.observe_batches=1",
        "prune.target.macs=0.5", "decay.steps=2", "train.lr=0.01", "recalibrate_batches=1", *overrides,
    )  # fmt: skip
    splits = Splits(
        synthetic(16), synthetic(8), synthetic(10), 10, (3, 32, 32), tuple("0123456789"), (0.5,) * 3, (0.5,) * 3
    )
    run, _, report = go_with(folder, recipe, splits, net, arch)
    return run.subject, report


def dearest_step(groups, widths, alive):
    """The most MACs that one more unit of a group, or one more step of its width, would cost."""
    dearest = 0
    for number, group in enumerate(groups):
        gone = group.start + np.flatnonzero(~alive[group.range])
        if len(gone):
            more = alive.copy()
            more[gone[: widths.step[number]]] = True
            dearest = max(dearest, cost_of(groups.cost, "macs", more) - cost_of(groups.cost, "macs", alive))
    return dearest


@pytest.mark.slow
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", NETS)
def test_target_is_met_within_one_unit_and_the_slim_net_outlives_its_run(tmp_path, monkeypatch, arch, way, round_to):
    export = "onnx" if way in ("group-norm", "otov2", "gate-decorator") else ""
    overrides = [f"prune.round_to={round_to}", f"export=[{export}]", *WAYS[way]]
    subject, report = go(tmp_path, arch, monkeypatch, *overrides)
    groups, target, pruning = subject.dense_groups, report.target, subject.pruning
    alive, widths = pruning.ancestry.survivors, pruning.goal.widths
    assert target.reached <= target.limit < target.reached + dearest_step(groups, widths, alive)
    assert groups.cost.macs(alive) == target.reached
    if way == "otov2 by score":
        assert pruning.topped_up == pruning.chosen
    for group, step in zip(groups, widths.step):
        assert alive[group.range].sum() in (group.size, *range(step, group.size, step))
    assert report.compact_difference <= 1e-5
    slim = load_slim(tmp_path / "slim.pt").module.eval()
    assert count_macs(slim, torch.zeros(1, 3, 32, 32)) == target.reached
    images = torch.randn(5, 3, 32, 32).double()  # in fp32 the layouts of both alone differ by more than the tolerance
    torch.testing.assert_close(slim.double()(images), subject.model.double().eval()(images), rtol=1e-9, atol=1e-9)
    if export:
        assert report.exports[0].max_difference < 1e-3
        assert (tmp_path / "model.onnx").exists()

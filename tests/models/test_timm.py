"""Families of timm: groups, exact removal, a training step, slim.pt, ONNX. Skipped without timm."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dpm_cli.export import export_model
from dpm_cli.graph import Groups, Units, compact_, find_groups
from dpm_cli.layers.images import Framing
from dpm_cli.measure import count_macs, count_parameters
from dpm_cli.method.budget import choose_victims, find_width_limits, resolve_limit
from dpm_cli.method.pruners.depgraph import GroupImportance
from dpm_cli.models import Metadata, build, load, save_slim

pytest.importorskip("timm")

SHAPE = (3, 64, 64)
IMAGES = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
ARCHITECTURES = [
    "mobilenetv3_small_100",
    "vit_tiny_patch16_224",
    "test_nfnet",
    "test_convnext2",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("resnet18", "efficientnet_b0", "convnext_atto", "deit_tiny_patch16_224", "mobilevit_xxs")
        + ("res2net50_14w_8s", "mixnet_s", "pit_ti_224")
    ),
]


def make(name: str) -> nn.Module:
    """Random weights with statistics of their own."""
    torch.manual_seed(0)
    model = build(f"timm:{name}", classes=5, shape=(3, 224, 224) if name == "pit_ti_224" else SHAPE)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model.eval()


def prune_to_half_(model: nn.Module, images: torch.Tensor) -> tuple[Groups, np.ndarray]:
    groups = find_groups(model, images)
    widths = find_width_limits(groups, round_to=8, min_keep=0.1)
    limit = resolve_limit(groups, widths, kind="macs", amount=0.5)
    victims = choose_victims(groups, widths, GroupImportance(groups, model).scores("mean"), kind="macs", limit=limit)
    Units(groups, model).scale_(torch.from_numpy(~victims).float())
    return groups, ~victims


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.every(2)
def test_a_family_is_pruned_to_half_trains_and_reloads(name: str, tmp_path: Path) -> None:
    shape = (3, 224, 224) if name == "pit_ti_224" else SHAPE
    images = IMAGES if shape == SHAPE else torch.randn(2, *shape)
    model = make(name)
    groups, alive = prune_to_half_(model, images)
    with torch.no_grad():
        before = model(images)
        compact_(model, groups, alive)
        after = model(images)
    assert float((before - after).abs().max()) <= 1e-5 * float(before.abs().max())
    assert (count_macs(model, images), count_parameters(model)) == (
        groups.cost.macs(alive),
        groups.cost.parameters(alive),
    )
    model.train()
    model(images).sum().backward()
    model.eval()
    with torch.no_grad():
        after = model(images)
    path, arch = tmp_path / "slim.pt", f"timm:{name}"
    save_slim(
        path, model, metadata=Metadata(5, Framing(shape), (0.0,) * 3, (1.0,) * 3, arch=arch), recipe="", report={}
    )
    with torch.no_grad():
        assert torch.equal(load(path)(images), after)


@pytest.mark.thorough
def test_the_embedding_is_pruned_on_request() -> None:
    model = make("deit_tiny_patch16_224")
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    groups = find_groups(model, IMAGES, prune_embedding=True)
    assert next(iter(groups)).name == "patch_embed.proj"
    assert not [kept.layer for kept in groups.kept if kept.layer != "head"]
    alive = np.arange(groups.units) % 2 == 0
    Units(groups, model).scale_(torch.from_numpy(alive).float())
    with torch.no_grad():
        before = model(IMAGES)
        compact_(model, groups, alive)
        assert float((before - model(IMAGES)).abs().max()) <= 1e-5 * float(before.abs().max())
    assert count_macs(model, IMAGES) == groups.cost.macs(alive)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "mobilevit_xxs"])
def test_a_pruned_family_becomes_onnx(name: str, tmp_path: Path) -> None:
    model = make(name)
    groups, alive = prune_to_half_(model, IMAGES)
    compact_(model, groups, alive)
    made = export_model(model, IMAGES[:1], format="onnx", path=tmp_path / "model.onnx", metadata={})
    assert made.max_difference <= 1e-4

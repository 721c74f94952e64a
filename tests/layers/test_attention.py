import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer

from dpm_cli.export import export_model
from dpm_cli.graph import Units, compact_, find_groups
from dpm_cli.layers.attention import SlimMultiheadAttention, _window_attention_class, fit_slim_class_
from dpm_cli.layers.images import Framing
from dpm_cli.models import Metadata, load_slim, save_slim


@pytest.mark.parametrize("batch_first", [True, False])
def test_slim_attention_is_torchs_own_while_all_heads_are_there(batch_first):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    nn.init.normal_(dense.in_proj_bias)
    slim = copy.deepcopy(dense)
    slim.__class__ = SlimMultiheadAttention
    query, other = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    if not batch_first:
        query, other = query.transpose(0, 1), other.transpose(0, 1)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:] = True
    causal = torch.randn(5, 7)
    for arguments in ({}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"need_weights": False}):
        expected, weights = dense(query, other, other, **arguments)
        out, slim_weights = slim(query, other, other, **arguments)
        torch.testing.assert_close(out, expected)
        if weights is not None:
            torch.testing.assert_close(slim_weights, weights)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (4, 10), (3, 4)])
def test_slim_window_attention_is_swins_own_while_all_heads_are_there(size, shift):
    torch.manual_seed(0)
    dense = ShiftedWindowAttention(12, [4, 4], [shift, shift], 3).eval()
    nn.init.normal_(dense.relative_position_bias_table)
    slim = copy.deepcopy(dense)
    slim.__class__ = _window_attention_class()
    x = torch.randn(2, *size, 12)
    torch.testing.assert_close(slim(x), dense(x))


def test_slim_layer_norm_counts_lost_channels_as_zeros():
    torch.manual_seed(0)
    dense = nn.LayerNorm(8)
    nn.init.normal_(dense.weight)
    nn.init.normal_(dense.bias)
    slim, x = copy.deepcopy(dense), torch.randn(2, 5, 8)
    left = torch.tensor([0, 3, 4, 6])
    x[..., [1, 2, 5, 7]] = 0
    slim.weight, slim.bias = nn.Parameter(dense.weight[left]), nn.Parameter(dense.bias[left])
    assert fit_slim_class_(slim)
    torch.testing.assert_close(slim(x[..., left]), dense(x)[..., left])


@pytest.mark.parametrize("prune_embedding", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        lambda: VisionTransformer(16, 8, num_layers=1, num_heads=4, hidden_dim=16, mlp_dim=24, num_classes=5),
        lambda: SwinTransformer([4, 4], 16, [2], [4], [2, 2], num_classes=5),
    ],
)
@pytest.mark.every(9)
def test_a_transformer_that_lost_heads_is_exact_and_reloads(build, prune_embedding, tmp_path):
    torch.manual_seed(0)
    dense = build().eval()
    for name, parameter in dense.named_parameters():
        if name.startswith("head") or "bias" in name:
            nn.init.normal_(parameter, 0, 0.1)
    slim, images = copy.deepcopy(dense), torch.randn(2, 3, 16, 16)
    groups = find_groups(slim, images, prune_embedding=prune_embedding)
    patches = "conv_proj" if hasattr(slim, "conv_proj") else "features.0.0"
    assert (patches in {group.name for group in groups}) is prune_embedding
    assert any(group.channels_per_unit == 12 for group in groups)  # q, k and v of a head of 4 dimensions
    alive = np.ones(groups.units, bool)
    for group in groups:
        alive[group.start : group.start + group.size // 2] = False
    Units(groups, slim).scale_(torch.from_numpy(alive).float())
    before = slim(images)
    compact_(slim, groups, alive)
    after = slim(images)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    path = tmp_path / "slim.pt"
    save_slim(
        path,
        slim,
        metadata=Metadata(5, Framing((3, 16, 16)), (0.0,) * 3, (1.0,) * 3),
        recipe="",
        report={},
        dense=dense,
    )
    assert torch.equal(load_slim(path, model=build()).module(images), after)
    found = find_groups(load_slim(path, model=build()).module, images)
    assert [group.size for group in found] == [
        group.size - group.size // 2 for group in groups if group.name != patches
    ]
    exported = export_model(slim, images[:1], format="pt2", path=tmp_path / "slim.pt2", metadata={})
    assert exported.max_difference <= 1e-5  # at several batches, so none is frozen

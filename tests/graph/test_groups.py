"""What is kept on request or for safety, and how shared and unusual parameters are treated."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_removable, cast, outputs_of, random_survivors, randomise_
from topologies import TOPOLOGIES, Net, conv_bn
from torch import nn

from dpm_cli.errors import RecipeError, UnsupportedModelError
from dpm_cli.graph import Units, compact_, find_groups

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def names(groups):
    return {group.name for group in groups}


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ((), {"stem.0", "blocks.0.0.0", "blocks.1.0.0", "blocks.2.0.0"}),
        (("stem.0",), {"blocks.0.0.0", "blocks.1.0.0", "blocks.2.0.0"}),
        (("stem",), {"blocks.0.0.0", "blocks.1.0.0", "blocks.2.0.0"}),
        (("blocks.1",), {"blocks.0.0.0", "blocks.2.0.0"}),  # its last layer is tied to the stem
        (("blocks.*.0",), {"stem.0"}),
        (("blocks.?.0.0", "head"), {"stem.0"}),
        (("blocks",), set()),
    ],
)
def test_layers_named_by_the_recipe_keep_their_outputs(keep, left):
    groups = find_groups(TOPOLOGIES["ResidualChain"].build(), EXAMPLE, keep)
    assert names(groups) == left
    reasons = {kept.layer: kept.reason for kept in groups.kept}
    for pattern in keep:
        assert pattern == "head" or any(f"({pattern})" in reason for reason in reasons.values())


def test_a_kept_layer_may_lose_inputs():
    groups = find_groups(TOPOLOGIES["ResidualChain"].build(), EXAMPLE, ["blocks.0.0.0"])
    assert any(part.tensor == "blocks.0.0.0.weight" and part.axis == 1 for part in groups.slices)


def test_a_pattern_without_a_layer_is_an_error_that_names_the_layers():
    with pytest.raises(RecipeError, match=r"'body\*'.*head, stem, blocks"):
        find_groups(TOPOLOGIES["ResidualChain"].build(), EXAMPLE, ["stem", "body*"])


def test_a_prefix_must_end_at_a_dot():
    with pytest.raises(RecipeError, match="'ste'"):
        find_groups(TOPOLOGIES["ResidualChain"].build(), EXAMPLE, ["ste"])


def test_a_shared_parameter_stays_one_parameter():
    model = TOPOLOGIES["SharedParameters"].build()
    groups = find_groups(model, EXAMPLE)
    compact_(model, groups, random_survivors(groups))
    assert model.a.weight is model.b.weight
    assert model.a.weight.shape == (4, 4, 1, 1)
    assert (model.b.in_channels, model.b.out_channels) == (4, 4)


def test_frozen_parameters_stay_frozen():
    model = TOPOLOGIES["Frozen"].build()
    groups = find_groups(model, EXAMPLE)
    compact_(model, groups, random_survivors(groups))
    assert [parameter.requires_grad for parameter in model.stem.parameters()] == [False] * 3
    assert all(parameter.requires_grad for parameter in model.last.parameters())


def test_finding_groups_changes_nothing_in_the_model():
    model = TOPOLOGIES["AuxiliaryHead"].build().train()
    model.stem.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    find_groups(model, EXAMPLE)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_operator_without_a_rule_keeps_what_it_touches_and_says_so():
    @torch.library.custom_op("dpm_tests::mix", mutates_args=())
    def mix(x: torch.Tensor) -> torch.Tensor:
        return x + x.flip(1)

    @mix.register_fake
    def _(x):
        return torch.empty_like(x)

    class Mixes(Net):
        def __init__(self):
            super().__init__(6)
            self.stem, self.body, self.last = conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 6)

        def trunk(self, x):
            return self.last(mix(self.body(self.stem(x))))

    groups = find_groups(Mixes(), EXAMPLE)
    assert names(groups) == {"stem.0", "last.0"}
    assert "operator mix has no pruning rule" in {kept.layer: kept.reason for kept in groups.kept}["body.0"]


class CallsItem(Net):
    """Its code depends on the data, so no graph describes it."""

    def trunk(self, x):
        return x * 2 if x.sum().item() > 0 else x


class PicksByMask(Net):
    """The number of rows depends on the data."""

    def forward(self, x):
        x = x.mean((2, 3))
        return self.head(x[x[:, 0] > 0])


class NeedsNumbers(Net):
    def trunk(self, x):
        return x.numpy()


@pytest.mark.parametrize("net", [CallsItem, PicksByMask, NeedsNumbers])
def test_a_model_that_cannot_be_analysed_is_refused_in_one_line(net):
    with pytest.raises(UnsupportedModelError) as refusal:
        find_groups(net(3), EXAMPLE)
    assert "\n" not in str(refusal.value)


def test_weights_that_do_not_depend_on_the_batch_cost_once():
    """Swin v2 makes its position bias from a table by a small network."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("places", torch.randn(16, 2))
            self.widen, self.narrow, self.stem = nn.Linear(2, 12), nn.Linear(12, 1), nn.Conv2d(3, 4, 2, stride=2)

        def forward(self, x):
            bias = self.narrow(torch.relu(self.widen(self.places))).view(1, 1, 4, 4)
            return self.stem(x) + bias

    groups = find_groups(Table(), EXAMPLE)
    assert groups.cost.macs(np.ones(groups.units, bool)) == 16 * (2 * 12 + 12) + 4 * 16 * 3 * 4
    half = random_survivors(groups)
    assert groups.cost.macs(half) == 16 * (2 * 6 + 6) + 4 * 16 * 3 * 4


def test_channels_last_weights_stay_channels_last():
    model = TOPOLOGIES["ResidualChain"].build().to(memory_format=torch.channels_last)
    groups = find_groups(model, EXAMPLE)
    compact_(model, groups, random_survivors(groups))
    assert model.blocks[0][0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_what_dies_makes_exact_zeros_whatever_the_statistics():
    torch.manual_seed(0)
    case = TOPOLOGIES["ResidualChain"]
    model = case.build().double()
    randomise_(model, cast(EXAMPLE, torch.float64))
    groups = find_groups(model, cast(EXAMPLE, torch.float64))
    (stem,) = [group for group in groups if group.name == "stem.0"]
    alive = np.ones(groups.units, bool)
    alive[stem.start + 2] = False
    Units(groups, model).scale_(torch.from_numpy(alive).double())
    (features,) = outputs_of(model.stem, cast(EXAMPLE, torch.float64))
    assert not features[:, 2].any()
    assert features.flatten(2).any(-1).sum() == 2 * 7


class NormByHand(Net):
    """Calls the function, not the layer: nothing would go on counting lost channels."""

    def __init__(self):
        super().__init__(8)
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.LayerNorm(8)

    def trunk(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        return F.layer_norm(x, x.shape[-1:], self.norm.weight, self.norm.bias).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["FusedAttention", "AttentionThatCountsItsHeads", "WindowAttention"])
def test_the_embedding_is_removed_exactly_on_request(name):
    torch.manual_seed(0)
    model, example = TOPOLOGIES[name].build().double(), cast(TOPOLOGIES[name].example, torch.float64)
    randomise_(model, example)
    groups = find_groups(model, example, prune_embedding=True)
    assert names(groups) == {*TOPOLOGIES[name].groups, "stem"}
    assert_removable(model, example, groups, random_survivors(groups), retrace=False)


def test_the_embedding_stays_where_the_recipe_or_the_code_says_so():
    fused = TOPOLOGIES["FusedAttention"].build()
    assert "stem" not in names(find_groups(fused, EXAMPLE, ["stem"], prune_embedding=True))
    by_hand = TOPOLOGIES["HandWrittenAttention"].build()
    assert names(find_groups(by_hand, EXAMPLE, ["stem"], prune_embedding=True)) == {"qkv", "widen"}
    assert names(find_groups(NormByHand(), EXAMPLE, prune_embedding=True)) == set()

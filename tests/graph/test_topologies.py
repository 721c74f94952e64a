"""Every topology is pruned as far as it can be, and compacts exactly."""

import odd_topologies  # noqa: F401  registers more
import pytest
import torch
from exactness import assert_removable, cast, random_survivors, randomise_
from topologies import TOPOLOGIES

from dpm_cli.graph import find_groups

# An instance norm without weights has no tensor from which its own number of channels could be set.
pytestmark = pytest.mark.filterwarnings("ignore:input's size at dim=1:UserWarning")


def prune_half(name: str, dtype: torch.dtype) -> None:
    case = TOPOLOGIES[name]
    torch.manual_seed(0)
    model = case.build().to(dtype)
    example = cast(case.example, dtype)
    randomise_(model, example)
    groups = find_groups(model, example)
    assert {group.name: group.size for group in groups} == case.groups
    reasons = {kept.layer: kept.reason for kept in groups.kept}
    for layer, reason in case.kept.items():
        assert reason in reasons[layer]
    assert_removable(model, example, groups, random_survivors(groups), retrace=case.retrace)


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.every(6)
def test_half_of_every_group_is_removed_exactly(name):
    prune_half(name, torch.float64)


@pytest.mark.parametrize("name", ["ResidualChain", "ConcatOfConcat", "SqueezeAndExcitation", "NonLocal"])
@pytest.mark.thorough
def test_half_of_every_group_is_removed_exactly_in_single_precision(name):
    prune_half(name, torch.float32)

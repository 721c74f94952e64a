"""What is left when one group alone loses units."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dpm_cli.data import Images
from dpm_cli.graph import compact_, find_groups
from dpm_cli.jobs.sensitivity import Taken, measure_sensitivity, take_images

torch.manual_seed(0)
NET = nn.Sequential(
    nn.Conv2d(3, 6, 3),
    nn.BatchNorm2d(6),
    nn.ReLU(),
    nn.Conv2d(6, 4, 3),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(4, 5),
).eval()
IMAGES, LABELS = torch.randn(7, 3, 8, 8), torch.arange(7) % 5
SPLIT = Taken(((IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])))


def test_rows_are_the_scores_of_networks_without_those_units():
    net = copy.deepcopy(NET)
    before = copy.deepcopy(net.state_dict())
    groups = find_groups(net, IMAGES)
    scores = np.array([5, 1, 4, 2, 6, 3, 4, 3, 2, 1], float)
    dense, rows = measure_sensitivity(net, groups, scores, SPLIT, share=0.5)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert abs(dense.loss - F.cross_entropy(NET(IMAGES), LABELS).item()) < 1e-6
    assert [(row.group, row.removed) for row in rows] == [("0", 3), ("3", 2)]
    for row, dead in zip(rows, ([1, 3, 5], [8, 9]), strict=True):
        alive = np.ones(10, bool)
        alive[dead] = False
        slim = copy.deepcopy(NET)
        compact_(slim, groups, alive)
        logits = slim(IMAGES)
        assert abs(row.loss - F.cross_entropy(logits, LABELS).item()) < 1e-5
        assert row.accuracy == 100 * int((logits.argmax(1) == LABELS).sum()) / 7
        assert row.macs_saved == 1 - groups.cost.macs(alive) / groups.cost.macs(np.ones(10, bool))


def test_at_least_one_unit_goes_and_one_stays():
    groups, scores = find_groups(NET, IMAGES), np.arange(10.0)
    for share, removed in ((0.01, [1, 1]), (0.99, [5, 3])):
        _, rows = measure_sensitivity(copy.deepcopy(NET), groups, scores, SPLIT, share=share)
        assert [row.removed for row in rows] == removed


def test_images_are_taken_of_all_classes_though_those_of_a_folder_are_in_their_order():
    labels = torch.arange(5).repeat_interleave(20)
    split = Images(torch.zeros(100, 3, 2, 2, dtype=torch.uint8), labels, torch.zeros(3), torch.ones(3))
    some = take_images(split, 25, batch=10, seed=0)
    taken = [each.tolist() for _, each in some.kept]
    assert [len(each) for each in taken] == [10, 10, 5]
    assert all(len(set(each)) > 1 for each in taken)
    assert {label for each in taken for label in each} == set(range(5))
    again = take_images(split, 25, batch=10, seed=0)
    assert [each.tolist() for _, each in again.kept] == taken
    assert sum(len(each) for _, each in take_images(split, 1000, batch=10, seed=0).kept) == 100

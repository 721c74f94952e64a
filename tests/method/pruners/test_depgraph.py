import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpm_cli.graph import Role, find_groups
from dpm_cli.method.pruners import DepGraph
from dpm_cli.method.pruners.depgraph import GroupImportance
from dpm_cli.recipe.sections import Prune, Training


class Net(nn.Module):
    """A residual group of 6 units, one of 5 with a depthwise layer in it, one of 4 that a flatten reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.depthwise = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.back = nn.Conv2d(5, 6, 1)
        self.last = nn.Conv2d(6, 4, 3, stride=4)
        self.head = nn.Linear(4 * 2 * 2, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.depthwise(F.relu(self.inner(x)))))
        return self.head(F.relu(self.last(x)).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture
def groups(net):
    found = find_groups(net, torch.zeros(2, 1, 8, 8))
    assert [group.size for group in found] == [6, 5, 4]
    return found


def make_base(normalizer, strength):
    prune = Prune(target={"macs": 0.5}, normalizer=normalizer, sparse_epochs=1, sparse_strength=strength)
    return DepGraph(prune, Training(), seed=0)


def penalise_(base, net):
    """As a step of sparse learning does."""
    sparse, _ = base.stages()
    base.enter(sparse, net, 0)
    base.before_step_()


def counted(net, groups):
    """(slice, tensor) of every layer whose entries count: rows and columns of matrices, weights of norms."""
    for part in groups.slices:
        if part.role in (Role.PRODUCER, Role.CONSUMER, Role.NORM):
            tensor = net.get_parameter(part.tensor)
            if (tensor.dim() == 1) == (part.role is Role.NORM):
                yield part, tensor


def slow_importance(net, groups, unit):
    """Mean over the layers of the unit's group of its sum of squares."""
    group = int(groups.group_of_unit[unit])
    squares = [
        sum(tensor.select(part.axis, int(at)).square().sum().item() for at in np.flatnonzero(part.units == unit))
        for part, tensor in counted(net, groups)
        if (groups.group_of_unit[part.units[part.units < groups.units]] == group).any()
    ]
    return sum(squares) / len(squares)


def test_importance_is_the_mean_over_layers_of_sums_of_squares(net, groups):
    expected = [slow_importance(net, groups, unit) for unit in range(groups.units)]
    np.testing.assert_allclose(GroupImportance(groups, net).importance().numpy(), expected, rtol=1e-5)


def test_a_residual_group_counts_rows_norms_and_columns(net, groups):
    """stem and back make it, norm scales it, inner and last read it: by hand, as one formula."""
    rows = net.stem.weight.flatten(1).square().sum(1) + net.back.weight.flatten(1).square().sum(1)
    columns = sum(layer.weight.transpose(0, 1).flatten(1).square().sum(1) for layer in (net.inner, net.last))
    expected = (rows + net.norm.weight.square() + columns) / 5
    torch.testing.assert_close(GroupImportance(groups, net).importance()[groups.groups[0].range], expected.detach())


@pytest.mark.parametrize(("normalizer", "reduce"), [("mean", np.mean), ("max", np.max)])
def test_scores_are_relative_to_the_group(net, groups, normalizer, reduce):
    base = make_base(normalizer, strength=0.0)
    base.bind(groups, net)
    scores = base.scores()
    for group in groups:
        importance = np.array(
            [slow_importance(net, groups, unit) for unit in range(*group.range.indices(groups.units))]
        )
        np.testing.assert_allclose(scores[group.range], importance / reduce(importance), rtol=1e-5)


def test_penalty_adds_strength_gamma_weight_to_rows_and_columns(net, groups):
    strength, expected = 5e-2, {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    gammas = {}
    for group in groups:
        units = range(*group.range.indices(groups.units))
        root = np.sqrt([slow_importance(net, groups, unit) for unit in units])
        gammas |= dict(zip(units, 2 ** (4 * (root.max() - root) / (root.max() - root.min()))))
    for part, tensor in counted(net, groups):
        for at, unit in enumerate(part.units):
            if unit < groups.units:  # the others always stay
                expected[part.tensor].select(part.axis, at).add_(
                    strength * gammas[unit] * tensor.detach().select(part.axis, at)
                )
    assert min(gammas.values()) == 1
    assert max(gammas.values()) == 16
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    base = make_base("max", strength)
    base.bind(groups, net)
    penalise_(base, net)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    assert not net.depthwise.weight.grad.any()  # as in the reference
    assert not net.stem.bias.grad.any()
    assert net.inner.weight.grad.any()


def test_penalty_adds_to_gradients_and_leaves_missing_ones_alone(net, groups):
    norms = GroupImportance(groups, net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    norms.penalise_(1e-2)
    alone = {name: p.grad.clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    net.last.weight.grad = None
    norms.penalise_(1e-2)
    for name, parameter in net.named_parameters():
        if name == "last.weight":
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, alone[name] + 1)


def test_equal_units_get_a_finite_penalty_and_finite_scores(net, groups):
    for value in (1.0, 0.0):
        model = copy.deepcopy(net)
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
            parameter.grad = torch.zeros_like(parameter)
        base = make_base("mean", strength=1.0)
        base.bind(groups, model)
        penalise_(base, model)
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        assert np.isfinite(base.scores()).all()


def test_binding_anew_looks_at_the_new_model(net, groups):
    base = make_base("mean", strength=0.0)
    base.bind(groups, net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.stem.weight[0] *= 100
    before = base.scores()
    base.bind(groups, other)
    assert base.scores()[0] > 2 * before[0]
    base.load_state_dict(base.state_dict())
    assert base.scores()[0] > 2 * before[0]


@pytest.mark.parametrize(("importance", "power"), [("taylor", 1), ("fisher", 2)])
def test_what_gradients_tell_is_summed_over_batches(net, groups, importance, power):
    base = DepGraph(Prune(target={"macs": 0.5}, importance=importance), Training(), seed=0)
    base.bind(groups, net)
    by_norm = make_base("mean", strength=0.0)
    by_norm.bind(groups, net)
    assert np.array_equal(base.scores(), by_norm.scores())  # nothing was seen yet
    assert not base.scores_are_losses
    expected = torch.zeros(groups.units)
    residual, inner, last = groups
    producers = [(residual, (net.stem, net.norm, net.back)), (inner, (net.inner, net.depthwise)), (last, (net.last,))]
    for _ in range(3):
        net.zero_grad()
        F.cross_entropy(net(torch.randn(4, 1, 8, 8)), torch.randint(3, (4,))).backward()
        change = torch.zeros(groups.units)
        for group, layers in producers:
            for parameter in (each for layer in layers for each in layer.parameters()):
                products = (parameter * parameter.grad).detach()
                change[group.range] += products.reshape(group.size, -1).sum(1)
        expected += change.abs() ** power
        base.observe_()
    np.testing.assert_allclose(base.scores(), expected, rtol=1e-4)
    assert base.scores_are_losses == (importance == "fisher")
    base.forget_()
    assert np.array_equal(base.scores(), by_norm.scores())


def test_importance_is_that_of_torch_pruning(net, groups):
    tp = pytest.importorskip("torch_pruning")
    graph = tp.DependencyGraph().build_dependency(net, torch.zeros(2, 1, 8, 8))
    importance = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean", normalizer=None, bias=False)
    theirs = {}
    for group in graph.get_all_groups(ignored_layers=[net.head]):
        names = {name for name, layer in net.named_modules() if any(layer is item.dep.layer for item in group.items)}
        theirs[frozenset(names)] = importance(group)
    ours = GroupImportance(groups, net).importance()
    members = [{"stem", "norm", "back", "inner", "last"}, {"inner", "depthwise", "back"}, {"last", "head"}]
    for group, names in zip(groups, members):
        torch.testing.assert_close(ours[group.range], theirs[frozenset(names)].detach(), rtol=1e-5, atol=0)

"""The same units, importances, penalties and costs as Torch-Pruning, which finds them in another way."""

import copy

import numpy as np
import pytest
import torch
import torch_pruning
from torch import nn

from dpm_cli.graph import Groups, Units, compact_, find_groups
from dpm_cli.measure import count_macs, count_parameters
from dpm_cli.method.pruners.depgraph import GroupImportance
from dpm_cli.models import build

ARCHITECTURES = [
    pytest.param("resnet20", 32, 12, 448, id="resnet20"),
    pytest.param("resnet56", 32, 30, 1120, id="resnet56", marks=pytest.mark.slow),
    pytest.param("vgg16_bn", 32, 13, 4224, id="vgg16_bn", marks=pytest.mark.slow),
    pytest.param("torchvision:mobilenet_v2", 32, 25, 9128, id="mobilenet_v2", marks=pytest.mark.slow),
]


def make(arch: str, size: int) -> tuple[nn.Module, torch.Tensor, nn.Module]:
    """A net with norm weights away from 1, an example, and its classifier, whose outputs stay."""
    torch.manual_seed(0)
    model = build(arch, classes=10, shape=(3, size, size)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.5)
    return model, torch.randn(2, 3, size, size), [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def reference_groups(model, example, classifier):
    graph = torch_pruning.DependencyGraph().build_dependency(model, example)
    layers = [nn.Conv2d, nn.Linear]
    return graph, list(graph.get_all_groups(ignored_layers=[classifier], root_module_types=layers))


def matching(groups: Groups, model: nn.Module, reference) -> slice:
    """The units of our group with the same layers."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = {
        names.get(id(item.dep.target.module)) for item in reference if item.dep.handler.__name__ == "prune_out_channels"
    }
    (own,) = [group for group in groups if set(group.layers) & layers]
    return own.range


@pytest.mark.parametrize(("arch", "size", "count", "units"), ARCHITECTURES)
@pytest.mark.thorough
def test_groups_units_and_importances_are_those_of_torch_pruning(arch, size, count, units):
    model, example, classifier = make(arch, size)
    groups = find_groups(model, example)
    assert (len(groups), groups.units) == (count, units)
    importance = GroupImportance(groups, model).importance().numpy()
    measure = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    _, references = reference_groups(model, example, classifier)
    assert len(references) == count
    covered = np.zeros(units, bool)
    for reference in references:
        own = matching(groups, model, reference)
        np.testing.assert_allclose(importance[own], measure(reference).numpy(), rtol=1e-5)
        covered[own] = True
    assert covered.all()


@pytest.mark.parametrize(("arch", "size", "count", "units"), ARCHITECTURES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.thorough
def test_penalty_is_the_sparse_learning_gradient_of_torch_pruning(arch, size, count, units, layout):
    model, example, classifier = make(arch, size)
    model.to(memory_format=layout)
    measure = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    pruner = torch_pruning.pruner.GroupNormPruner(
        model, example, importance=measure, reg=1e-3, ignored_layers=[classifier], global_pruning=True
    )
    groups = find_groups(model, example)
    gradients = []
    for penalise_ in (lambda: pruner.regularize(model), lambda: GroupImportance(groups, model).penalise_(1e-3)):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        penalise_()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    theirs, ours = gradients
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-8, msg=name)
    assert sum(bool(gradient.any()) for gradient in ours.values()) > count


@pytest.mark.parametrize(("arch", "size", "count", "units"), ARCHITECTURES)
def test_removing_the_same_units_gives_the_same_network(arch, size, count, units):
    model, example, _ = make(arch, size)
    groups = find_groups(model, example)
    alive = np.random.default_rng(0).random(units) < 0.6
    for group in groups:
        alive[group.start] = True
    Units(groups, model).scale_(torch.from_numpy(alive).float())
    twin = copy.deepcopy(model)
    compact_(model, groups, alive)

    twin_classifier = [module for module in twin.modules() if isinstance(module, nn.Linear)][-1]
    graph, references = reference_groups(twin, example, twin_classifier)
    for reference in references:
        dead = np.flatnonzero(~alive[matching(groups, twin, reference)]).tolist()
        root = reference[0]
        graph.get_pruning_group(root.dep.target.module, root.dep.handler, dead).prune()

    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in twin.state_dict().items()}
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert groups.cost.macs(alive) == count_macs(twin, example)
    assert groups.cost.parameters(alive) == count_parameters(twin)

"""What every topology must fulfil: removal changes nothing, costs are predicted exactly, training goes on."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dpm_cli.graph import Groups, Units, compact_, find_groups
from dpm_cli.layers.modes import plain_attention
from dpm_cli.measure import count_parameters

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}


def call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def cast(example: Any, dtype: torch.dtype) -> Any:
    """Floating-point inputs in another type."""
    return map_tensors(example, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def map_tensors(example: Any, function: Any) -> Any:
    if isinstance(example, Tensor):
        return function(example)
    if isinstance(example, Mapping):
        return {key: map_tensors(value, function) for key, value in example.items()}
    return tuple(map_tensors(value, function) for value in example)


def flatten_outputs(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [tensor for output in outputs for tensor in flatten_outputs(output)] if outputs is not None else []


@torch.no_grad()
def randomise_(model: nn.Module, example: Any, seed: int = 0) -> None:
    """Affine parameters and biases far from their defaults, running statistics of real activations; eval mode."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1 or min(parameter.shape, default=1) == 1 or (parameter == parameter.flatten()[0]).all():
            parameter.uniform_(-1, 1).add_(parameter.sign() * 0.3)
    norms = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    model.train()
    for norm in norms:
        norm.momentum = None  # the average over all batches
    for _ in range(2):
        call(model, map_tensors(example, lambda t: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t))
    for norm in norms:
        norm.momentum = 0.1
    model.eval()


def random_survivors(groups: Groups, seed: int = 0) -> np.ndarray:
    """(units,) A random half of every group dies; one unit always stays."""
    random = np.random.default_rng(seed)
    alive = np.ones(groups.units, bool)
    for group in groups:
        dead = random.permutation(group.size)[: group.size // 2]
        alive[group.start + dead] = False
    return alive


def outputs_of(model: nn.Module, example: Any) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad(), plain_attention():
        return flatten_outputs(call(model, example))


def measured_macs(model: nn.Module, example: Any) -> int:
    """Of the first input of the batch, counted by torch while the model runs."""
    with torch.no_grad(), plain_attention(), FlopCounterMode(display=False) as counter:
        call(model, map_tensors(example, lambda tensor: tensor[:1]))
    return int(counter.get_total_flops()) // 2


def assert_same_structure(left: Groups, right: Groups) -> None:
    assert left.groups == right.groups
    assert [(s.tensor, s.axis, s.role, s.units.tolist()) for s in left.slices] == [
        (s.tensor, s.axis, s.role, s.units.tolist()) for s in right.slices
    ]


def assert_trains(model: nn.Module, example: Any) -> None:
    model.train()
    sum(output.double().square().mean() for output in flatten_outputs(call(model, example))).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients or not any(parameter.requires_grad for parameter in model.parameters())
    model.eval()


def assert_removable(
    model: nn.Module,
    example: Any,
    groups: Groups,
    alive: np.ndarray,
    *,
    keep: Sequence[str] = (),
    retrace: bool = True,
) -> None:
    """Zeroing dead units and removing them give the same outputs, and everything predicted is true. Changes `model`."""
    dtype = next(model.parameters()).dtype
    dense = copy.deepcopy(model)
    Units(groups, model).scale_(torch.from_numpy(alive).to(dtype))
    before = outputs_of(model, example)
    compact_(model, groups, alive)
    after = outputs_of(model, example)
    assert len(before) == len(after)
    for old, new in zip(before, after):
        assert old.shape == new.shape
        assert old.isfinite().all()
        if old.is_floating_point():
            assert float((old - new).abs().max()) <= RELATIVE[dtype] * float(old.abs().max())
    assert any(float(old.double().std()) > 1e-6 for old in before), "constant outputs prove nothing"
    everything = np.ones(groups.units, bool)
    assert groups.cost.macs(everything) == measured_macs(dense, example)
    assert groups.cost.parameters(everything) == count_parameters(dense)
    assert groups.cost.macs(alive) == measured_macs(model, example)
    assert groups.cost.parameters(alive) == count_parameters(model)
    if retrace:
        again, left = find_groups(model, example, keep), groups.survivors(alive)
        assert_same_structure(left, again)
        some = random_survivors(again, seed=1)
        assert left.cost.macs(some) == again.cost.macs(some)
        assert left.cost.parameters(some) == again.cost.parameters(some)
    assert_trains(model, example)

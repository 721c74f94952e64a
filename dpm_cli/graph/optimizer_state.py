"""What an optimizer remembers, after units were removed from its model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpm_cli.graph.compact import KeptPositions, take


@torch.no_grad()
def shrink_optimizer_(
    optimizer: Optimizer, model: nn.Module, before: Mapping[str, nn.Parameter], kept: KeptPositions
) -> None:
    """Let an optimizer go on with the parameters that `compact_` has put into a model.

    Its parameter groups stay the same objects, so that schedulers which hold the optimizer go on too; of momenta and
    the like the kept positions stay. before: the parameters by name, as they were. kept: what `compact_` returned.
    """
    after = dict(model.named_parameters(remove_duplicate=False))
    names = {id(before[name]): name for name in kept if name in before}
    for group in optimizer.param_groups:
        for place, old in enumerate(group["params"]):
            name = names.get(id(old))
            if name is None or after[name] is old:
                continue
            group["params"][place] = after[name]
            remembered = optimizer.state.pop(old, None)
            if remembered is not None:
                optimizer.state[after[name]] = {
                    key: take(value, kept[name]) if isinstance(value, Tensor) and value.shape == old.shape else value
                    for key, value in remembered.items()
                }

"""Remove dead units physically: the network becomes smaller and computes the same as with zeros in it."""

from collections.abc import Mapping, Sequence
from typing import assert_never

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.graph.groups import Groups, NumberChange
from dpm_cli.graph.labels import Flags, Ids
from dpm_cli.graph.sizes import Counts
from dpm_cli.layers.attention import fit_slim_class_
from dpm_cli.layers.counting import note_count_
from dpm_cli.layers.modes import in_mode
from dpm_cli.layers.requests import answer_

KeptPositions = Mapping[str, Mapping[int, Ids]]


@torch.no_grad()
def compact_(model: nn.Module, groups: Groups, alive: Flags) -> KeptPositions:
    """Remove every dead unit from parameters and buffers, and set the layers' own numbers.

    alive: (units,). Call once the dead units are zero. Parameters are replaced: make a new optimizer, and new `Units`
    of `groups.survivors(alive)`. Returns which positions stay along every axis that lost some, so that optimizer
    state can follow.

        groups = find_groups(model, example)
        alive = np.arange(groups.units) % 2 == 0
        Units(groups, model).scale_(torch.from_numpy(alive).float())
        compact_(model, groups, alive)
        groups = groups.survivors(alive)
    """
    kept = groups.kept_positions(alive)
    replaced: dict[int, Tensor] = {}
    touched: dict[nn.Module, str] = {}
    done: set[tuple[nn.Module, str]] = set()
    for name, axes in kept.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if (module, attribute) in done:  # a shared layer has several names
            continue
        done.add((module, attribute))
        note_count_(module)
        old = getattr(module, attribute)
        if id(old) not in replaced:  # a shared parameter stays shared
            new = take(old.detach(), axes)
            replaced[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        setattr(module, attribute, replaced[id(old)])
        touched[module] = path
    with in_mode(model, training=False):  # a spectral norm changes its vectors when its weight is read in train mode
        for module, path in touched.items():
            fit_layer_(module, kept.get(f"{path}.weight".lstrip("."), {}).get(0))
    for name, changes in groups.new_numbers(alive).items():
        layer = model.get_submodule(name)
        if not fit_slim_class_(layer) and not (isinstance(layer, nn.GroupNorm) and layer.weight is not None):
            _resize_numbers_(layer, changes)
    for name, requests in groups.new_requests(alive).items():
        answer_(model.get_submodule(name), [request for request in requests if request.needs_answer])
    return kept


def _resize_numbers_(layer: nn.Module, changes: Sequence[NumberChange]) -> None:
    """Guess which integers in a layer's own code are numbers of heads, widths or parts, and set them.

    A forward pass verifies the guess.
    """
    fresh: dict[str, object] = {}
    for change in changes:
        for name in holders(layer, change.old, change.counts):
            new = change.new[0] if type(vars(layer)[name]) is int else type(vars(layer)[name])(change.new)
            fresh.setdefault(name, new)
    for name, value in fresh.items():
        setattr(layer, name, value)


def holders(layer: nn.Module, numbers: tuple[int, ...], counts: Counts) -> list[str]:
    """Return the attributes of a layer that may hold these numbers."""
    return [
        name
        for name, value in vars(layer).items()
        if (type(value) is int and (value,) == numbers and _may_count(name.lower(), counts))
        or (type(value) in (list, tuple) and len(value) > 1 and tuple(value) == numbers)
    ]


def _may_count(name: str, counts: Counts) -> bool:
    """Tell whether an attribute of this name may hold a number of heads, a width, or any part of one."""
    match counts:
        case "heads":
            return "head" in name and "dim" not in name
        case "width":
            return any(word in name for word in ("dim", "width", "channels", "features"))
        case "parts":
            return True
        case _:
            assert_never(counts)


def take(tensor: Tensor, axes: Mapping[int, Ids]) -> Tensor:
    """Select the kept positions along some axes; keep the memory format."""
    layout = torch.channels_last if _is_channels_last(tensor) else torch.contiguous_format
    if tensor.is_meta:  # a new tensor of the shape is the answer, and much faster
        shape = [len(axes[axis]) if axis in axes else size for axis, size in enumerate(tensor.shape)]
        return torch.empty(shape, dtype=tensor.dtype, device="meta", memory_format=layout)
    for axis, positions in axes.items():
        tensor = tensor.index_select(axis, torch.from_numpy(positions).to(tensor.device))
    return tensor.to(memory_format=layout)  # `contiguous` leaves one channel or one position as it is


def fit_layer_(module: nn.Module, rows_kept: Ids | None) -> None:
    """Make a layer's own numbers agree with the shapes of its weights.

    rows_kept: which rows of the weight stayed; None if all did. A depthwise layer loses conv groups, any other grouped
    layer rows of every group; when one input channel per group is left, the shapes alone do not tell which it is.
    """
    if fit_slim_class_(module):
        return
    match module:
        case nn.modules.conv._ConvTransposeNd():
            rows, columns = module.weight.shape[:2]
            if module.groups == module.in_channels:  # depthwise: one group per channel
                module.groups = rows
            module.in_channels, module.out_channels = rows, columns * module.groups
        case nn.modules.conv._ConvNd():
            rows, columns = module.weight.shape[:2]
            if module.groups > 1 and rows_kept is not None:
                module.groups = len(np.unique(rows_kept // (module.out_channels // module.groups)))
            module.in_channels, module.out_channels = columns * module.groups, rows
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case nn.modules.batchnorm._NormBase():
            sized = module.weight if module.weight is not None else module.running_mean
            if sized is not None:
                module.num_features = sized.shape[0]
        case nn.GroupNorm() if module.weight is not None:
            per_group = module.num_channels // module.num_groups
            module.num_channels = module.weight.shape[0]
            module.num_groups = module.num_channels // per_group
        case nn.PReLU():
            module.num_parameters = module.weight.shape[0]
        case nn.Embedding():
            module.embedding_dim = module.weight.shape[1]


def _is_channels_last(tensor: Tensor) -> bool:
    """By the strides: with one channel or one position, torch calls a tensor contiguous in both formats."""
    if tensor.dim() != 4:
        return False
    _, channels, height, width = tensor.shape
    return tensor.stride() == (height * width * channels, 1, width * channels, channels)

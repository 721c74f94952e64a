"""Physical removal: the network becomes really smaller, and computes the same as with zeros in it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpm_cli.attention import fit_attention_
from dpm_cli.graph.groups import Groups, trace_groups
from dpm_cli.graph.labels import Flags, Ids
from dpm_cli.graph.trace import Example, run_example, split_example

KeptPositions = Mapping[str, Mapping[int, Ids]]


def find_groups(model: nn.Module, example: Example, keep: Sequence[str] = ()) -> Groups:
    """All groups of units that can be removed exactly, in the order of the model's layers.

    Labels see the operators, not the Python around them: a `view(b, 12, 64)` with numbers in the code only shows when
    it is run. So half of every group is removed from a copy without data, which is run once; groups that break it are
    kept.

    example: inputs with a batch of 2 or more. keep: layer names or patterns whose outputs stay whole.
    Raises UnsupportedModelError if the model cannot be exported, RecipeError if a pattern names no layer.
    """
    groups = trace_groups(model, example, keep)
    candidates = [i for i, group in enumerate(groups) if group.size > 1]
    if _survives(model, example, groups, candidates):
        return groups
    broken = [i for i in candidates if not _survives(model, example, groups, [i])]
    rest: list[int] = []
    for i in (i for i in candidates if i not in broken):  # what works alone may fail together
        if _survives(model, example, groups, [*rest, i]):
            rest.append(i)
        else:
            broken.append(i)
    return groups.without(dict.fromkeys(broken, "the model's code holds a size that removing its channels would break"))


def _survives(model: nn.Module, example: Example, groups: Groups, chosen: Sequence[int]) -> bool:
    """Whether a forward pass still works, with outputs of the same shapes, when the chosen groups lose about half."""
    if not chosen:
        return True
    alive = np.ones(groups.units, bool)
    for i in chosen:
        group = groups.groups[i]
        alive[group.start : group.start + group.size // 2] = False
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = copy_without_data(model, mode)
    fake.eval()
    args, kwargs = split_example(example)
    with mode, torch.no_grad():
        inputs = (
            tuple(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
            if not kwargs
            else {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        )
        wanted = _shapes(run_example(fake, inputs))
        compact_(fake, groups, alive)
        try:
            return _shapes(run_example(fake, inputs)) == wanted
        except Exception:  # whatever the model's own code raises about a size it does not expect
            return False


def copy_without_data(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A deep copy whose parameters and buffers are fake tensors; no weight is copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = mode.from_tensor(buffer)
    return copy.deepcopy(model, memo)


@torch.no_grad()
def compact_(model: nn.Module, groups: Groups, alive: Flags) -> KeptPositions:
    """Remove every dead unit from parameters and buffers, and set the layers' own numbers.

    alive: (units,). Parameters are replaced: make the optimizer and the `Units` of `groups.survivors(alive)` anew.
    Returns which positions stay along every axis that lost some, for what is kept beside the parameters.
    """
    kept = groups.kept_positions(alive)
    replaced: dict[int, Tensor] = {}
    touched: dict[str, nn.Module] = {}
    for name, axes in kept.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, attribute)
        if id(old) not in replaced:  # a shared parameter stays shared
            new = take(old.detach(), axes)
            replaced[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        setattr(module, attribute, replaced[id(old)])
        touched[path] = module
    for path, module in touched.items():
        fit_layer_(module, kept.get(f"{path}.weight".lstrip("."), {}).get(0))
    for name, sizes in groups.new_sizes(alive).items():
        layer = model.get_submodule(name)
        if not fit_attention_(layer):
            _resize_numbers_(layer, sizes)
    return kept


def _resize_numbers_(layer: nn.Module, sizes: Mapping[int, int]) -> None:
    """Numbers of heads and inner widths that hand-written attention keeps. Whether the guess holds, a forward pass
    tells.
    """
    for name, value in vars(layer).items():
        counts_heads = "head" in name.lower() and "dim" not in name.lower()
        if type(value) is int and value in sizes and (counts_heads or value == max(sizes)):
            setattr(layer, name, sizes[value])


def take(tensor: Tensor, axes: Mapping[int, Ids]) -> Tensor:
    """The kept positions along some axes, in the memory format of the original."""
    layout = torch.channels_last if _is_channels_last(tensor) else torch.contiguous_format
    for axis, positions in axes.items():
        tensor = tensor.index_select(axis, torch.from_numpy(positions).to(tensor.device))
    return tensor.contiguous(memory_format=layout)


def fit_layer_(module: nn.Module, rows_kept: Ids | None) -> None:
    """Make a layer's own numbers agree with the shapes of its weights.

    rows_kept: which rows of the weight stayed, if any left. A depthwise layer loses conv groups, any other grouped
    layer rows of every group; when one input channel per group is left, the shapes alone do not tell which it is.
    """
    if fit_attention_(module):
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
            module.num_channels = module.num_groups = module.weight.shape[0]
        case nn.PReLU():
            module.num_parameters = module.weight.shape[0]
        case nn.Embedding():
            module.embedding_dim = module.weight.shape[1]


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _shapes(outputs: Any) -> list[tuple[int, ...]]:
    if isinstance(outputs, Tensor):
        return [tuple(outputs.shape)]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [shape for output in outputs or () for shape in _shapes(output)] if isinstance(outputs, list | tuple) else []

"""Find how a slim module differs from a dense one of the same architecture, and make that difference again.

A layer's widths exist twice: in the shapes of its tensors and in plain integer attributes (in_channels, groups,
num_features, normalized_shape, num_heads …). The shapes come with the saved tensors; the attributes are the `Edits`.
So no layer type needs to be known, and a module that was pruned twice is like one that was pruned once.

One thing can be added: a bias, to a layer that has none, where the means of removed channels went.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dpm_cli.errors import ModelFileError, UnsupportedModelError, listing
from dpm_cli.layers.attention import fit_slim_class_
from dpm_cli.layers.counting import SlimCounting, note_count_
from dpm_cli.layers.requests import HELD_AS, answer_, class_as_built, decode, encode, requests_of

Size = int | list[int]
Edits = dict[str, dict[str, Size]]  # module name -> attribute -> value in the slim module


def find_edits(slim: nn.Module, dense: nn.Module) -> Edits:
    """Find the integer attributes that are smaller in `slim`. `dense` may be on the meta device.

    An attribute that grew is a counter or a cache, not a width, and is left alone.
    Raises UnsupportedModelError if `slim` is not `dense` with fewer channels.
    """
    problem = _find_difference(slim, dense)
    if problem:
        raise UnsupportedModelError(problem)
    edits: Edits = {}
    for name, layer in slim.named_modules():
        built = _sizes(dense.get_submodule(name))
        sizes = _sizes(layer)
        smaller = {key: sizes[key] for key in sizes if key in built and _is_smaller(sizes[key], built[key])}
        if requests := requests_of(layer):
            smaller[HELD_AS] = encode(requests)
        if smaller:
            edits[name] = smaller
    return edits


def apply_edits_(module: nn.Module, edits: Edits, tensors: Mapping[str, Tensor]) -> None:
    """Turn a freshly built dense module into the slim one: set the attributes, replace parameters and buffers.

    `tensors` holds every parameter and persistent buffer by name, and may hold other buffers; they are copied with
    their dtype and memory layout. Parameters that are shared in `module` stay shared. A layer built without a bias gets
    one if `tensors` has it.
    Raises ModelFileError if they do not belong to this architecture; `module` is unusable then.
    """
    layers = dict(module.named_modules())
    for layer in layers.values():
        note_count_(layer)
    for name, sizes in edits.items():
        if name not in layers:
            raise ModelFileError(f"there is no layer {name!r}")
        _resize_(layers[name], name, sizes)
    _add_biases_(module, tensors)
    _replace_tensors_(module, tensors)
    for layer in layers.values():
        fit_slim_class_(layer)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _has_place_for_bias(module: nn.Module, name: str) -> bool:
    """Tell whether a tensor of this name would be the bias of a layer that was built without one."""
    owner, _, leaf = name.rpartition(".")
    layer = dict(module.named_modules()).get(owner)
    return leaf == "bias" and isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and layer.bias is None


def _add_biases_(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Add biases of zeros, of the layer's own width, so that their replacements are checked like any other tensor."""
    for name in tensors:
        if _has_place_for_bias(module, name):
            layer = module.get_submodule(name.rpartition(".")[0])
            rows = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            assert isinstance(rows, int)
            layer.bias = nn.Parameter(torch.zeros(rows))


def _resize_(layer: nn.Module, name: str, sizes: Mapping[str, Size]) -> None:
    """Set attributes of one layer. Raises ModelFileError unless they exist and become smaller."""
    built = _sizes(layer)
    for attribute, size in sizes.items():
        if attribute == HELD_AS and isinstance(size, list):
            try:
                answer_(layer, decode(size))
            except ValueError as error:
                raise ModelFileError(f"{name}: {error}") from None
            continue
        if attribute not in built or not _is_smaller(size, built[attribute]):
            raise ModelFileError(f"{name}.{attribute} cannot become {str(size)[:60]}")
        kind = type(getattr(layer, attribute))
        setattr(layer, attribute, size if isinstance(size, int) else kind(size))


def _replace_tensors_(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put copies of the tensors in place. Raises ModelFileError if one is absent, unknown or too large."""
    built = dict(named_tensors(module))
    persistent = module.state_dict(keep_vars=True).keys() & built.keys()
    if absent := (persistent - tensors.keys()) or (tensors.keys() - built.keys()):
        where = "the file" if absent <= persistent else "the architecture"
        raise ModelFileError(f"{listing(sorted(absent), shown=5)} {'is' if len(absent) == 1 else 'are'} not in {where}")
    replaced: dict[int, Tensor] = {}  # id of a built tensor -> its replacement, so that shared ones stay shared
    for name, old in built.items():
        if name not in tensors:
            continue
        saved = tensors[name]
        if not _fits(saved, old):
            raise ModelFileError(f"{name} is {_describe(saved)}, built as {_describe(old)}")
        if id(old) not in replaced:
            new = saved.detach().clone(memory_format=torch.preserve_format)
            is_parameter = isinstance(old, nn.Parameter)
            replaced[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, replaced[id(old)])


def _find_difference(slim: nn.Module, dense: nn.Module) -> str | None:
    """Say in one line why `slim` cannot be `dense` with fewer channels; None if it can."""
    slim_layers, dense_layers = dict(slim.named_modules()), dict(dense.named_modules())
    if other := slim_layers.keys() ^ dense_layers.keys():
        return f"{listing(sorted(other), shown=5)} exists in only one of the model and its architecture"
    for name, layer in slim_layers.items():
        built = type(dense_layers[name])
        fits = class_as_built(layer) is built or isinstance(layer, SlimCounting)
        if next(layer.children(), None) is None and not fits:
            return f"{name} is a {type(layer).__name__}, in the architecture a {built.__name__}"
    slim_tensors, dense_tensors = dict(named_tensors(slim)), dict(named_tensors(dense))
    other = {name for name in slim_tensors.keys() ^ dense_tensors.keys() if not _has_place_for_bias(dense, name)}
    if other:
        return f"{listing(sorted(other), shown=5)} exists in only one of the model and its architecture"
    for name, tensor in slim_tensors.items():
        if name in dense_tensors and not _fits(tensor, dense_tensors[name]):
            return f"{name} is {_describe(tensor)}, in the architecture {_describe(dense_tensors[name])}"
    if _shared_names(slim_tensors) != _shared_names(dense_tensors):
        return "the model and its architecture share different parameters"
    return None


def _sizes(layer: nn.Module) -> dict[str, Size]:
    """Collect the attributes of a layer that are integers or sequences of integers (booleans are not)."""
    sizes: dict[str, Size] = {}
    for name, value in vars(layer).items():
        if type(value) is int:
            sizes[name] = value
        elif type(value) in (tuple, list, torch.Size) and value and all(type(item) is int for item in value):
            sizes[name] = list(value)
    return sizes


def _is_smaller(size: Size, built: Size) -> bool:
    if isinstance(size, int) or isinstance(built, int):
        return isinstance(size, int) and isinstance(built, int) and 0 <= size < built
    return size != built and len(size) == len(built) and all(0 <= new <= old for new, old in zip(size, built))


def _fits(tensor: Tensor, built: Tensor) -> bool:
    """Tell whether a tensor can be a part of `built`: as many axes, no longer ones, the same kind of number."""
    return (
        tensor.dim() == built.dim()
        and all(new <= old for new, old in zip(tensor.shape, built.shape))
        and tensor.is_floating_point() == built.is_floating_point()
    )


def _shared_names(tensors: Mapping[str, Tensor]) -> set[frozenset[str]]:
    """Collect sets of names that share one tensor."""
    names: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

"""Analyse a model: export it, label its graph, keep what cannot go, and solve the ties."""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpm_cli.errors import RecipeError, UsageError
from dpm_cli.graph.compact import holders
from dpm_cli.graph.groups import Groups
from dpm_cli.graph.labels import Ids, Owner, Role, Ties, Value
from dpm_cli.graph.numbering import UNUSED, number_groups
from dpm_cli.graph.program import Example, export, output_shapes, split_example
from dpm_cli.graph.sizes import Asking
from dpm_cli.graph.trace import label
from dpm_cli.layers.attention import fit_slim_class_
from dpm_cli.layers.counting import can_lose_channels
from dpm_cli.layers.requests import requests_of


def trace_groups(
    model: nn.Module, example: Example, keep: Sequence[str] = (), *, prune_embedding: bool = False
) -> Groups:
    """Find the groups in a model's exported graph, before `find_groups` checks that its own code allows removal.

    example: inputs as the model takes them, with a batch of 2 or more.
    keep: layers whose outputs stay whole, by name or pattern; a name covers the layers below it.
    prune_embedding: let channels of residual streams go that layer norms average over.
    Raises UnsupportedModelError if the model cannot be exported, RecipeError if a pattern names no layer.
    """
    aliases = _aliases(model)
    first = {name: names[0] for names in aliases.values() for name in names}
    norms = {name for name, module in model.named_modules() if can_lose_channels(module)}
    ties, parameters = Ties(_batch_of(example), _held_numbers(model), norms), dict[str, Value]()
    program = export(model, example)
    used = label(program, ties, parameters, first)
    unused = [name for name, _ in model.named_parameters() if first.get(name, name) not in used]
    if unused:
        # Auxiliary heads are only there in train mode; their costs are not part of inference.
        inference_costs = list(ties.costs)
        used |= label(export(model, example, training=True), ties, parameters, first)
        ties.costs[:] = inference_costs
    if not prune_embedding:
        ties.keep_residual()
    unused = [name for name in parameters if name not in used]
    for name in unused:
        ties.keep_all(parameters[name], UNUSED)
    _keep_named(model, ties, keep)
    _keep_buffers(model, ties)
    _keep_shared_axes(ties)
    _tie_numbers(model, ties)
    ties.asking[:] = _asked_as_built(model, ties.asking)
    answering = frozenset(name for name, layer in model.named_modules() if requests_of(layer))
    groups = number_groups(model, ties, parameters, aliases, unused)
    return replace(groups, outputs=output_shapes(program), answering=answering)


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map the first name of a shared parameter or buffer to all its names."""
    names: dict[int, list[str]] = {}
    for source in (model.named_parameters, model.named_buffers):
        for name, tensor in source(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return {same[0]: tuple(same) for same in names.values() if len(same) > 1}


def _held_numbers(model: nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    """Collect (layer, integers) for every attribute that is an integer, or a list or tuple of several."""
    return {
        (name, numbers)
        for name, module in model.named_modules()
        for value in vars(module).values()
        if (numbers := (value,) if type(value) is int else tuple(value) if type(value) in (list, tuple) else ())
        and all(type(number) is int for number in numbers)
    }


def _batch_of(example: Example) -> int:
    """Return the number of inputs in the example: the length of a list, or of the first tensor's first axis.

    Raises UsageError if there is no tensor in it.
    """
    args, kwargs = split_example(example)
    for argument in [*args, *kwargs.values()]:
        tensors = [leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor)]
        if tensors:
            return len(argument) if isinstance(argument, list) else int(tensors[0].shape[0]) if tensors[0].dim() else 1
    raise UsageError("the example holds no tensor: pass inputs as the model takes them")


def _asked_as_built(model: nn.Module, asking: Sequence[Asking]) -> Iterator[Asking]:
    """Yield what layers' own code asks for, of the sizes that it names even if others are left of them.

    Attention layers that take their sizes from their weights ask for nothing.
    """
    for call in asking:
        layer = model.get_submodule(call.layer)
        if fit_slim_class_(layer):
            continue
        shape = (call.rank, call.after_rank, [(size.axis, size.asked) for size in call.asked])
        for request in requests_of(layer):
            if shape == (request.rank, request.after_rank, [(axis, left) for axis, _, left in request.asked]):
                sizes = (replace(size, asked=asked) for size, (_, asked, _) in zip(call.asked, request.asked))
                call = replace(call, asked=tuple(sizes))
                break
        yield call


def _tie_numbers(model: nn.Module, ties: Ties) -> None:
    """Tie what one attribute of a layer counts in several places: it cannot hold two numbers.

    Attention layers that take their sizes from their weights hold no such number. A width and a number of parts are
    different things, even if they are equal.
    """
    counted: dict[tuple[str, str, str], tuple[Ids, ...]] = {}
    for number in ties.numbers:
        layer = model.get_submodule(number.layer)
        if number.counts == "width" or fit_slim_class_(layer):
            continue
        sizes = tuple(len(labels) for labels in number.parts)
        for name in holders(layer, sizes, number.counts):
            first = counted.setdefault((number.layer, name, number.counts), number.parts)
            for left, right in zip(first, number.parts) if first is not number.parts else ():
                ties.tie(left, right)


def _keep_named(model: nn.Module, ties: Ties, patterns: Sequence[str]) -> None:
    """Keep what the user's patterns name. Raises RecipeError for a pattern that matches no layer."""
    modules = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        matched = {name for name in modules if fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            layers = ", ".join(name for name in modules if "." not in name)
            raise RecipeError(f"prune.keep names {pattern!r}, which matches no layer; layers are {layers}")
        made = ties.made()
        for owner in ties.owners:
            layer = owner.tensor.rpartition(".")[0]
            if made[owner.start] and any(layer == name or layer.startswith(f"{name}.") for name in matched):
                ties.keep(owner.ids, f"kept by the recipe ({pattern})")


def _keep_buffers(model: nn.Module, ties: Ties) -> None:
    """Keep buffers that are indices or make values; others follow their units, though they never shrink to zero."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    roles, made = ties.roles(), ties.made()
    for owner in ties.owners:
        if owner.tensor in buffers and owner.size and roles[owner.start] != Role.BUFFER:
            if buffers[owner.tensor].is_floating_point() and not made[owner.start]:
                ties.mark(owner.ids, Role.BUFFER)
            else:
                ties.keep(owner.ids, f"{owner.tensor}: a buffer of fixed size")


def _keep_shared_axes(ties: Ties) -> None:
    """Keep one of two producing axes of a parameter: it would be scaled twice, once for each of its units."""
    roles, axes = ties.roles(), dict[str, list[Owner]]()
    touched = ties.touched()
    for owner in ties.owners:
        scales = owner.size > 1 and Role(roles[owner.start]).is_producing
        if scales and touched[owner.start]:
            axes.setdefault(owner.tensor, []).append(owner)
    several = {tensor: owners for tensor, owners in axes.items() if len(owners) > 1}
    if not several:
        return
    components = ties.components()
    is_kept = ties.kept(components)[0][components] >= 0
    for tensor, owners in several.items():
        for owner in [owner for owner in owners if not is_kept[owner.ids].all()][1:]:
            ties.keep(owner.ids, f"{tensor} belongs to two sets of channels")

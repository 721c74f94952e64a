"""Groups of units: which positions of which parameters belong together, with roles and cost."""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from dpm_cli.errors import RecipeError
from dpm_cli.graph.cost import Cost, build_cost, parameter_term
from dpm_cli.graph.labels import Counts, Flags, Ids, Owner, Role, Ties, Value
from dpm_cli.graph.rules import NO_RULE
from dpm_cli.graph.trace import Example, export, label, output_shapes, split_example
from dpm_cli.layers.attention import can_lose_channels

UNUSED = "not used by the model's forward pass"


@dataclass(frozen=True)
class Slice:
    """Which unit every index along one axis of a parameter or buffer belongs to."""

    tensor: str  # name in the state dict
    axis: int
    role: Role
    units: Ids  # (size of the axis,) unit numbers; `Groups.units` stands for "always stays"


@dataclass(frozen=True)
class Group:
    """The units of one set of tied layers, numbered start … start + size - 1 over the whole model."""

    name: str  # of the first layer that makes the units' values
    layers: tuple[str, ...]  # that make them
    start: int
    size: int
    channels_per_unit: int  # rows of the first layer per unit: 1, or the groups of a grouped convolution
    least: int = 1  # units that must stay, or the model's code breaks

    @property
    def range(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class HeldNumber:
    """A number, or a list of them, in a layer's own code that must follow when units are removed."""

    layer: str
    parts: tuple[Ids, ...]  # of each number: the units of what it counts; `Groups.units` for what always stays
    counts: Counts


@dataclass(frozen=True)
class NumberChange:
    """What an integer attribute (one number) or a list of integers of a layer becomes."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    counts: Counts


@dataclass(frozen=True)
class Kept:
    """A layer whose outputs stay whole, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Groups:
    """Everything that can be removed from one model, in the order of its layers."""

    groups: tuple[Group, ...]
    slices: tuple[Slice, ...]
    units: int
    kept: tuple[Kept, ...]
    cost: Cost
    aliases: Mapping[str, tuple[str, ...]]  # a parameter's name -> all its names, where it is shared
    numbers: tuple[HeldNumber, ...] = ()
    outputs: tuple[tuple[int, ...], ...] = ()  # shapes of what the model returns for the example

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def group_of_unit(self) -> Ids:
        """(units,) the number of each unit's group."""
        return np.repeat(np.arange(len(self.groups)), [group.size for group in self.groups]).astype(np.int64)

    def kept_positions(self, alive: Flags) -> dict[str, dict[int, Ids]]:
        """Tensor -> axis -> the positions that stay, for every axis that loses some. alive: (units,)"""
        stays = np.append(alive, True)
        positions: dict[str, dict[int, Ids]] = {}
        for part in self.slices:
            mask = stays[part.units]
            if not mask.all():
                for name in self.aliases.get(part.tensor, (part.tensor,)):
                    positions.setdefault(name, {})[part.axis] = np.flatnonzero(mask)
        return positions

    def widths(self, alive: Flags) -> Iterator[tuple[str, int, int]]:
        """Every layer that makes units: its name, its rows now, and those of them that stay. alive: (units,)"""
        stays, seen = np.append(alive, True), set[str]()
        for part in self.slices:
            layer = part.tensor.rpartition(".")[0] or part.tensor
            if part.role is Role.PRODUCER and layer not in seen:
                seen.add(layer)
                yield layer, len(part.units), int(stays[part.units].sum())

    def new_numbers(self, alive: Flags) -> dict[str, list[NumberChange]]:
        """Layer -> how numbers of its own change. alive: (units,)"""
        stays = np.append(alive, True)
        changes: dict[str, list[NumberChange]] = {}
        for number in self.numbers:
            old = tuple(len(units) for units in number.parts)
            new = tuple(int(stays[units].sum()) for units in number.parts)
            if new != old:
                changes.setdefault(number.layer, []).append(NumberChange(old, new, number.counts))
        return changes

    def survivors(self, alive: Flags) -> "Groups":
        """The groups of the compacted model: the dead units are gone and the rest is numbered anew. alive: (units,)"""
        left = int(alive.sum())
        number = np.append(np.where(alive, np.cumsum(alive) - 1, -1), left)
        slices = []
        for part in self.slices:
            units = number[part.units]
            slices.append(replace(part, units=units[units >= 0]))
        numbers = tuple(
            replace(held, parts=tuple(units[units >= 0] for units in (number[part] for part in held.parts)))
            for held in self.numbers
        )
        groups, start = [], 0
        for group in self.groups:
            size = int(alive[group.range].sum())
            groups.append(replace(group, start=start, size=size))
            start += size
        return replace(
            self,
            groups=tuple(groups),
            slices=tuple(slices),
            numbers=numbers,
            units=left,
            cost=self.cost.survivors(alive),
        )

    def bounded(self, least: Mapping[int, int]) -> "Groups":
        """The same with a number of units that must stay for some groups (numbers -> units)."""
        groups = tuple(replace(group, least=least.get(i, group.least)) for i, group in enumerate(self.groups))
        return replace(self, groups=groups)

    def without(self, unwanted: Mapping[int, str]) -> "Groups":
        """The same model with some groups (numbers -> reasons) kept whole."""
        if not unwanted:
            return self
        wanted = np.array([i not in unwanted for i in range(len(self.groups))])
        alive = wanted[self.group_of_unit]
        left = int(alive.sum())
        number = np.append(np.where(alive, np.cumsum(alive) - 1, left), left)
        groups, start = [], 0
        for group in (group for group, stays in zip(self.groups, wanted) if stays):
            groups.append(replace(group, start=start))
            start += group.size
        lost = np.asarray(self.cost.incidence[:, np.flatnonzero(~alive)].sum(1)).ravel().astype(np.int64)
        cost = replace(self.cost.survivors(alive), fixed=self.cost.fixed + lost)
        kept = [
            Kept(layer, unwanted[i]) for i, group in enumerate(self.groups) if i in unwanted for layer in group.layers
        ]
        slices = tuple(replace(part, units=number[part.units]) for part in self.slices)
        numbers = tuple(replace(held, parts=tuple(number[part] for part in held.parts)) for held in self.numbers)
        return replace(
            self,
            groups=tuple(groups),
            slices=slices,
            numbers=numbers,
            units=left,
            cost=cost,
            kept=self.kept + tuple(kept),
        )


def trace_groups(
    model: nn.Module, example: Example, keep: Sequence[str] = (), *, prune_embedding: bool = False
) -> Groups:
    """Groups of a model from its exported graph, before the check that its own code allows their removal.

    example: inputs as the model takes them, with a batch of 2 or more.
    keep: layers whose outputs stay whole, by name or pattern; a name covers the layers below it.
    prune_embedding: whether channels that layer norms average over can go.
    Raises UnsupportedModelError if the model cannot be exported, RecipeError if a pattern names no layer.
    """
    aliases = _aliases(model)
    first = {name: names[0] for names in aliases.values() for name in names}
    tensor = next(value for value in _tensors_in(example))
    norms = {name for name, module in model.named_modules() if prune_embedding and can_lose_channels(module)}
    ties, parameters = Ties(int(tensor.shape[0]), _held_lists(model), norms), dict[str, Value]()
    program = export(model, example)
    used = label(program, ties, parameters, first)
    unused = [name for name, _ in model.named_parameters() if first.get(name, name) not in used]
    if unused:
        # Auxiliary heads are only there in train mode; their costs are not part of inference.
        inference_costs = list(ties.costs)
        used |= label(export(model, example, training=True), ties, parameters, first)
        ties.costs[:] = inference_costs
    unused = [name for name in parameters if name not in used]
    for name in unused:
        ties.keep_all(parameters[name], UNUSED)
    _keep_named(model, ties, keep)
    _keep_buffers(model, ties)
    _keep_shared_axes(ties)
    return replace(_build(model, ties, parameters, aliases, unused), outputs=output_shapes(program))


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name -> all names, for parameters and buffers that have several."""
    names: dict[int, list[str]] = {}
    for source in (model.named_parameters, model.named_buffers):
        for name, tensor in source(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return {same[0]: tuple(same) for same in names.values() if len(same) > 1}


def _held_lists(model: nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    """(layer, integers) for every attribute that is a list or a tuple of several integers."""
    return {
        (name, tuple(value))
        for name, module in model.named_modules()
        for value in vars(module).values()
        if type(value) in (list, tuple) and len(value) > 1 and all(type(item) is int for item in value)
    }


def _tensors_in(example: Example) -> Iterator[Tensor]:
    args, kwargs = split_example(example)
    yield from (value for value in [*args, *kwargs.values()] if isinstance(value, Tensor))


def _keep_named(model: nn.Module, ties: Ties, patterns: Sequence[str]) -> None:
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
    """A buffer that is not a norm's statistics can neither shrink nor be known to follow its unit."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    roles = ties.roles()
    for owner in ties.owners:
        if owner.tensor in buffers and owner.size and roles[owner.start] != Role.BUFFER:
            ties.keep(owner.ids, f"{owner.tensor}: a buffer of fixed size")


def _keep_shared_axes(ties: Ties) -> None:
    """A parameter with two axes of producing labels would be scaled twice, once for each of its units."""
    roles, axes = ties.roles(), dict[str, list[Owner]]()
    touched = ties.touched()
    for owner in ties.owners:
        scales = owner.size > 1 and Role(roles[owner.start]).is_scaled
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


def _build(
    model: nn.Module,
    ties: Ties,
    parameters: Mapping[str, Value],
    aliases: dict[str, tuple[str, ...]],
    unused: Sequence[str],
) -> Groups:
    components, made, roles = ties.components(), ties.made(), ties.roles()
    reason_of_component, reasons = ties.kept(components)
    count = len(reason_of_component)
    prunable = np.zeros(count, bool)
    prunable[components[made]] = True
    prunable &= reason_of_component < 0

    # Units of one group touch the same axes equally often: add a random number per axis and compare the sums.
    numbers = np.random.default_rng(0).integers(2**63, size=len(ties.owners), dtype=np.uint64)
    signature = np.zeros(count, np.uint64)
    for owner, number in zip(ties.owners, numbers):
        np.add.at(signature, components[owner.start : owner.start + owner.size], number)

    first = np.full(count, ties.size)  # the first label of a component that makes values orders everything
    made_labels = np.flatnonzero(made)
    np.minimum.at(first, components[made_labels], made_labels)
    chosen = np.flatnonzero(prunable)
    _, group_of, sizes = np.unique(signature[chosen], return_inverse=True, return_counts=True)
    group_first = np.full(len(sizes), ties.size)
    np.minimum.at(group_first, group_of, first[chosen])
    order = np.lexsort((first[chosen], group_first[group_of]))
    chosen, group_of = chosen[order], group_of[order]
    unit_of_component = np.full(count, -1)
    unit_of_component[chosen] = np.arange(len(chosen))
    unit_of_label = unit_of_component[components]

    units = len(chosen)
    slices = []
    for owner in ties.owners:
        own = unit_of_label[owner.start : owner.start + owner.size]
        if (own >= 0).any():
            slices.append(Slice(owner.tensor, owner.axis, Role(roles[owner.start]), np.where(own >= 0, own, units)))
    terms = [
        parameter_term(value.shape, {owner.axis: owner.ids for owner in owners})
        for value, owners in _parameters_with_owners(model, ties, parameters)
    ]
    spare = sum(p.numel() for name, p in model.named_parameters() if name not in parameters)
    terms.append(parameter_term((spare,), {}))
    return Groups(
        groups=tuple(
            _name_groups(group_of, slices, made_tensors={owner.tensor for owner in ties.owners if made[owner.start]})
        ),
        slices=tuple(slices),
        units=units,
        kept=_explain_kept(ties, reason_of_component[components], reasons, made, parameters, unused),
        cost=build_cost(ties.costs, terms, unit_of_label, units, ties.batch),
        aliases=aliases,
        numbers=tuple(
            HeldNumber(
                held.layer,
                tuple(np.where(unit_of_label[ids] >= 0, unit_of_label[ids], units) for ids in held.parts),
                held.counts,
            )
            for held in ties.numbers
        ),
    )


def _parameters_with_owners(
    model: nn.Module, ties: Ties, parameters: Mapping[str, Value]
) -> Iterator[tuple[Value, list[Owner]]]:
    owners: dict[str, list[Owner]] = {}
    for owner in ties.owners:
        owners.setdefault(owner.tensor, []).append(owner)
    for name, _ in model.named_parameters():
        if name in parameters:
            yield parameters[name], owners.get(name, [])


def _name_groups(group_of: Ids, slices: Sequence[Slice], made_tensors: set[str]) -> Iterator[Group]:
    """group_of: (units,) in unit order, equal numbers side by side."""
    starts = np.flatnonzero(np.diff(group_of, prepend=-1)).tolist()
    layers: list[list[str]] = [[] for _ in starts]
    per_unit = [1] * len(starts)
    for part in slices:
        if part.role is not Role.PRODUCER or part.tensor not in made_tensors:
            continue
        members, counts = np.unique(part.units[part.units < len(group_of)], return_counts=True)
        for number in np.unique(np.searchsorted(starts, members, side="right") - 1).tolist():
            layer = part.tensor.rpartition(".")[0] or part.tensor
            if not layers[number]:
                per_unit[number] = int(counts[np.searchsorted(members, starts[number])])
            if layer not in layers[number]:
                layers[number].append(layer)
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(group_of)])):
        yield Group(layers[number][0], tuple(layers[number]), start, end - start, per_unit[number])


def _explain_kept(
    ties: Ties,
    reason_of_label: Ids,
    reasons: Sequence[str],
    made: Flags,
    parameters: Mapping[str, Value],
    unused: Sequence[str],
) -> tuple[Kept, ...]:
    """reason_of_label: (labels,) the number of the reason that keeps it, -1 for none."""
    found: dict[str, str] = {}
    for owner in ties.owners:
        if owner.size and (made[owner.start] or parameters[owner.tensor].rank > 1):
            own = reason_of_label[owner.start : owner.start + owner.size]
            for number in own[own >= 0].tolist():
                if made[owner.start] or reasons[number].endswith(NO_RULE):
                    found.setdefault(owner.tensor.rpartition(".")[0] or owner.tensor, reasons[number])
                    break
    for name in unused:
        if parameters[name].shape:
            found.setdefault(name.rpartition(".")[0] or name, UNUSED)
    return tuple(Kept(layer, reason) for layer, reason in found.items())

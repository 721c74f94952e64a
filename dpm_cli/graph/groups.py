"""Hold groups of units: which positions of which parameters belong together, with their roles and cost."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from dpm_cli.graph.cost import Cost
from dpm_cli.graph.labels import Flags, Ids, Role
from dpm_cli.graph.sizes import Asking, Counts, Number
from dpm_cli.layers.requests import Request


@dataclass(frozen=True)
class Slice:
    """Maps every index along one axis of a parameter or buffer to its unit."""

    tensor: str  # name in the state dict
    axis: int
    role: Role
    units: Ids  # (size of the axis,) unit numbers; `Groups.units` means "always stays"


@dataclass(frozen=True)
class Group:
    """The units of one set of tied layers. Over the whole model they are numbered start … start + size - 1."""

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
class NumberChange:
    """The new value of an integer attribute (one number) or a list of integers of a layer."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    counts: Counts


@dataclass(frozen=True)
class Kept:
    """A layer whose outputs stay whole, with the reason."""

    layer: str
    reason: str
    macs: int = 0  # of one input, in the dense model


@dataclass(frozen=True)
class Groups:
    """Everything that can be removed from one model, in the order of its layers.

    Units are numbered over the whole model, so one array of flags says who lives: `alive` (units,).

        alive = np.ones(groups.units, bool)
        alive[groups.groups[0].start] = False  # the first unit of the first group dies
        groups.cost.macs(alive)
    """

    groups: tuple[Group, ...]
    slices: tuple[Slice, ...]
    units: int
    kept: tuple[Kept, ...]
    cost: Cost
    aliases: Mapping[str, tuple[str, ...]]  # a parameter's name -> all its names, where it is shared
    numbers: tuple[Number, ...] = ()  # that count units; `units` for what always stays
    asking: tuple[Asking, ...] = ()  # likewise
    answering: frozenset[str] = frozenset()  # layers whose code goes on asking for the sizes of the dense model
    outputs: tuple[tuple[int, ...], ...] = ()  # shapes of what the model returns for the example
    layer_macs: Mapping[str, int] = field(default_factory=dict)  # of one input, in the dense model

    def macs_kept(self) -> dict[str, int]:
        """Return how many MACs of the dense model are in layers that each reason keeps whole."""
        reasons: dict[str, int] = {}
        for kept in {kept.layer: kept for kept in self.kept}.values():
            reason = re.sub(r"^\S+: (?=.* )", "", kept.reason)  # without the layer that it begins with
            reasons[reason] = reasons.get(reason, 0) + kept.macs
        return reasons

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def group_of_unit(self) -> Ids:
        """Return the number of each unit's group: (units,)."""
        return np.repeat(np.arange(len(self.groups)), [group.size for group in self.groups]).astype(np.int64)

    @cached_property
    def kinds(self) -> list[str]:
        """Return each group's name without numbers: the same for what repeats in a model."""
        return [re.sub(r"\d+", "#", group.name) for group in self.groups]

    def kept_positions(self, alive: Flags) -> dict[str, dict[int, Ids]]:
        """Return which positions stay, by tensor and axis, for every axis that loses some. alive: (units,)"""
        stays = np.append(alive, True)
        positions: dict[str, dict[int, Ids]] = {}
        for part in self.slices:
            mask = stays[part.units]
            if not mask.all():
                for name in self.aliases.get(part.tensor, (part.tensor,)):
                    positions.setdefault(name, {})[part.axis] = np.flatnonzero(mask)
        return positions

    def widths(self, alive: Flags) -> Iterator[tuple[str, int, int]]:
        """Yield every layer that makes units: its name, how many rows it has, and how many stay. alive: (units,)"""
        stays, seen = np.append(alive, True), set[str]()
        for part in self.slices:
            layer = part.tensor.rpartition(".")[0] or part.tensor
            if part.role is Role.PRODUCER and layer not in seen:
                seen.add(layer)
                yield layer, len(part.units), int(stays[part.units].sum())

    def new_numbers(self, alive: Flags) -> dict[str, list[NumberChange]]:
        """Return how the numbers in each layer's own code change. alive: (units,)"""
        stays = np.append(alive, True)
        changes: dict[str, list[NumberChange]] = {}
        for number in self.numbers:
            if number.layer in self.answering:
                continue
            old = tuple(len(units) for units in number.parts)
            new = tuple(int(stays[units].sum()) for units in number.parts)
            if new != old:
                changes.setdefault(number.layer, []).append(NumberChange(old, new, number.counts))
        return changes

    def new_requests(self, alive: Flags) -> dict[str, list[Request]]:
        """Return what the code of answering layers asks for, with the sizes that are left. alive: (units,)"""
        stays = np.append(alive, True)
        requests: dict[str, dict[Request, None]] = {}
        for asking in self.asking:
            if asking.layer in self.answering:
                requests.setdefault(asking.layer, {})[asking.request(stays)] = None
        return {layer: list(found) for layer, found in requests.items()}

    def letting_answer(self, numbers: Collection[int]) -> "Groups":
        """Return the same groups, with layers that answer where code asks for sizes of some groups (by number)."""
        wanted = np.append(np.isin(self.group_of_unit, list(numbers)), False)
        layers = {asking.layer for asking in self.asking if wanted[asking.counted()].any()}
        return replace(self, answering=self.answering | layers)

    def survivors(self, alive: Flags) -> "Groups":
        """Return the groups of the compacted model: dead units are gone, the others renumbered. alive: (units,)"""
        left = int(alive.sum())
        number = np.append(np.where(alive, np.cumsum(alive) - 1, -1), left)
        slices = []
        for part in self.slices:
            units = number[part.units]
            slices.append(replace(part, units=units[units >= 0]))

        def renumber(units: Ids) -> Ids:
            fresh: Ids = number[units]
            return fresh[fresh >= 0]

        numbers = tuple(replace(held, parts=tuple(map(renumber, held.parts))) for held in self.numbers)
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
            asking=tuple(asking.counting(renumber) for asking in self.asking),
            units=left,
            cost=self.cost.survivors(alive),
        )

    def bounded(self, least: Mapping[int, int]) -> "Groups":
        """Return the same groups, of which some (by number) cannot fall below a number of units."""
        groups = tuple(replace(group, least=least.get(i, group.least)) for i, group in enumerate(self.groups))
        return replace(self, groups=groups)

    def without(self, unwanted: Mapping[int, str]) -> "Groups":
        """Return the other groups: some (by number) are kept whole, each for its reason."""
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
            Kept(layer, unwanted[i], self.layer_macs.get(layer, 0))
            for i, group in enumerate(self.groups)
            if i in unwanted
            for layer in group.layers
        ]
        slices = tuple(replace(part, units=number[part.units]) for part in self.slices)
        numbers = tuple(replace(held, parts=tuple(number[part] for part in held.parts)) for held in self.numbers)
        return replace(
            self,
            groups=tuple(groups),
            slices=slices,
            numbers=numbers,
            asking=tuple(asking.counting(lambda units: number[units]) for asking in self.asking),
            units=left,
            cost=cost,
            kept=self.kept + tuple(kept),
        )

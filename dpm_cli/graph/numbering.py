"""Turn solved ties into units that are numbered group by group."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import nn

from dpm_cli.graph.cost import build_cost, parameter_term
from dpm_cli.graph.groups import Group, Groups, Kept, Slice
from dpm_cli.graph.labels import CostTerm, Flags, Ids, Owner, Role, Ties, Value
from dpm_cli.graph.rules import NO_RULE
from dpm_cli.graph.sizes import Asking

UNUSED = "not used by the model's forward pass"


def number_groups(
    model: nn.Module,
    ties: Ties,
    parameters: Mapping[str, Value],
    aliases: dict[str, tuple[str, ...]],
    unused: Sequence[str],
) -> Groups:
    """Solve the ties: every component that makes values and that nothing keeps becomes a unit.

    parameters: the labelled value of every parameter and buffer. unused: those that no forward pass reads.
    """
    components, made, roles = ties.components(), ties.made(), ties.roles()
    reason_of_component, reasons = ties.kept(components)
    count = len(reason_of_component)
    prunable = np.zeros(count, bool)
    prunable[components[made]] = True
    prunable &= reason_of_component < 0
    chosen, group_of = _order_units(ties, components, made, np.flatnonzero(prunable), count)
    unit_of_component = np.full(count, -1)
    unit_of_component[chosen] = np.arange(len(chosen))
    unit_of_label = unit_of_component[components]
    units = len(chosen)

    def unit_of(ids: Ids) -> Ids:
        return np.where(unit_of_label[ids] >= 0, unit_of_label[ids], units)

    slices = []
    owners: dict[str, list[Owner]] = {}
    for owner in ties.owners:
        owners.setdefault(owner.tensor, []).append(owner)
        own = unit_of_label[owner.start : owner.start + owner.size]
        if (own >= 0).any():
            role = _role_of(roles[owner.start : owner.start + owner.size])
            slices.append(Slice(owner.tensor, owner.axis, role, np.where(own >= 0, own, units)))
    return Groups(
        groups=tuple(
            _name_groups(group_of, slices, made_tensors={owner.tensor for owner in ties.owners if made[owner.start]})
        ),
        slices=tuple(slices),
        units=units,
        kept=_explain_kept(ties, reason_of_component[components], reasons, made, parameters, unused),
        cost=build_cost(
            ties.costs,
            _parameter_terms(model, parameters, owners),
            unit_of_label,
            units,
            ties.batch,
            {
                name: list(dict.fromkeys(owner.axis for owner in owners.get(name, [])))
                for name in _labelled(model, parameters)
            },
        ),
        aliases=aliases,
        numbers=tuple(replace(held, parts=tuple(map(unit_of, held.parts))) for held in ties.numbers),
        asking=tuple(call for call in _solve_asking(ties.asking, unit_of, units) if call.asked or call.merged),
        layer_macs=_macs_by_layer(ties),
    )


def _solve_asking(asking: Sequence[Asking], unit_of: Callable[[Ids], Ids], units: int) -> Iterator[Asking]:
    """Let calls that ask for sizes count units instead of labels."""
    for call in asking:
        yield call.counting(unit_of).without_fixed(units)


def _role_of(roles: npt.NDArray[np.int8]) -> Role:
    """Return the role of an axis: if any index must shrink to be read no more, all do."""
    return Role.READER if (roles == Role.READER).any() else Role(roles[0])


def _macs_by_layer(ties: Ties) -> dict[str, int]:
    """Count the MACs of every layer's own operators for one input."""
    macs: dict[str, int] = {}
    for term in ties.costs:
        macs[term.layer] = macs.get(term.layer, 0) + term.total
    return {layer: total // ties.batch for layer, total in macs.items()}


def _order_units(ties: Ties, components: Ids, made: Flags, chosen: Ids, count: int) -> tuple[Ids, Ids]:
    """Put units in the order of their layers, those of one group side by side.

    components: (labels,) of `count` components. chosen: (units,) the components that are units. Returns them in order,
    and the number of each one's group: equal within a group, but otherwise arbitrary.
    """
    # Units of one group touch the same axes equally often: add a random number per axis and compare the sums.
    numbers = np.random.default_rng(0).integers(2**63, size=len(ties.owners), dtype=np.uint64)
    signature = np.zeros(count, np.uint64)
    for owner, number in zip(ties.owners, numbers):
        np.add.at(signature, components[owner.start : owner.start + owner.size], number)

    first = np.full(count, ties.size)  # the first label of a component that makes values orders everything
    made_labels = np.flatnonzero(made)
    np.minimum.at(first, components[made_labels], made_labels)
    _, group_of, sizes = np.unique(signature[chosen], return_inverse=True, return_counts=True)
    group_first = np.full(len(sizes), ties.size)
    np.minimum.at(group_first, group_of, first[chosen])
    order = np.lexsort((first[chosen], group_first[group_of]))
    return chosen[order], group_of[order]


def _labelled(model: nn.Module, parameters: Mapping[str, Value]) -> list[str]:
    return [name for name, _ in model.named_parameters() if name in parameters]


def _parameter_terms(
    model: nn.Module, parameters: Mapping[str, Value], owners: Mapping[str, Sequence[Owner]]
) -> list[CostTerm]:
    """Count the entries of every labelled parameter, and of all others together. owners: of each one's axes"""
    terms = [
        parameter_term(parameters[name].shape, {owner.axis: owner.ids for owner in owners.get(name, [])})
        for name in _labelled(model, parameters)
    ]
    spare = sum(p.numel() for name, p in model.named_parameters() if name not in parameters)
    return [*terms, parameter_term((spare,), {})]


def _name_groups(group_of: Ids, slices: Sequence[Slice], made_tensors: set[str]) -> Iterator[Group]:
    """Name every group after its first layer.

    group_of: (units,) the group of every unit; equal numbers lie side by side.
    """
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
    """Give every layer that stays whole the first reason for it.

    reason_of_label: (labels,) the number of the reason that keeps a label; -1 if nothing does.
    """
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
    macs = _macs_by_layer(ties)
    return tuple(Kept(layer, why, macs.get(layer, 0) if why != UNUSED else 0) for layer, why in found.items())

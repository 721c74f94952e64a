"""Try removal on copies before anything is promised.

Labels see the operators, not the Python around them: a `view(b, 12, 64)` with numbers in the code, a `squeeze()` that
takes one channel too many, or a `sqrt(q.shape[-1])` only shows when it is run. Shapes are tried first, without data;
then one removal is carried out for real, and the outputs are compared.
"""

from collections.abc import Sequence

import numpy as np
from torch import nn

from dpm_cli.errors import DpmError, UnsupportedModelError, one_line
from dpm_cli.graph.analysis import trace_groups
from dpm_cli.graph.copies import Rehearsal
from dpm_cli.graph.groups import Groups
from dpm_cli.graph.labels import Flags
from dpm_cli.graph.lively import make_lively
from dpm_cli.graph.program import Example
from dpm_cli.graph.search import Survives, find_broken
from dpm_cli.graph.trial import BREAKS, Trial

ANSWERS = 4  # kinds of layers that may raise, one after the other, before the groups that break are looked for
SHARES = 0.618  # groups lose shares that lie this far apart, modulo 1


def find_groups(
    model: nn.Module, example: Example, keep: Sequence[str] = (), *, prune_embedding: bool = False
) -> Groups:
    """Find all groups of units that can be removed exactly, in the order of the model's layers.

    On copies, every group loses a share of its units, each another one, then all but one unit. Groups that break the
    code, or whose removal changes the outputs, are kept whole; those that only break it with their last but one get a
    lower bound.

    example: inputs with a batch of 2 or more. keep: layer names or patterns whose outputs stay whole.
    prune_embedding: let channels go that layer norms average over; the norms go on counting them as zeros.
    Raises UnsupportedModelError if the model cannot be exported, RecipeError if a pattern names no layer.

        groups = find_groups(model, torch.randn(2, 3, 32, 32), keep=["fc"])
        for group in groups:
            print(group.name, group.size)
    """
    try:
        groups = trace_groups(model, example, keep, prune_embedding=prune_embedding)
        rehearsal = Rehearsal(model, example, groups.outputs)
        if _is_sound(rehearsal, model, example, groups):
            return groups
        return rehearse_values(model, example, _rehearse_shapes(rehearsal, groups))
    except DpmError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"the model cannot be analysed: {one_line(error)}") from error


def rehearse_survivors(model: nn.Module, example: Example, groups: Groups, alive: Flags) -> Groups:
    """Try one planned removal without data, with a step of training, and keep the groups that break it.

    alive: (units,) survivors. Shapes alone: `find_groups` has compared outputs.
    """
    rehearsal = Rehearsal(model, example, groups.outputs)
    left = [int(alive[group.range].sum()) for group in groups]

    def survives(chosen: Sequence[int]) -> bool:
        return rehearsal.survives(groups, {i: left[i] for i in chosen}, trains=True)

    losing = [i for i, group in enumerate(groups) if left[i] < group.size]
    broken = find_broken(survives, losing, kinds=groups.kinds, suspects=lambda: rehearsal.suspects(groups))
    return groups.without(dict.fromkeys(broken, BREAKS))


def rehearse_values(model: nn.Module, example: Example, groups: Groups) -> Groups:
    """Keep the groups whose removal changes the outputs, even if layers answer what their code asks for."""
    culprits = _find_culprits(model, example, groups)
    answering = groups.letting_answer(culprits)
    if answering.answering > groups.answering:
        answering = _rehearse_shapes(Rehearsal(model, example, answering.outputs), answering)
        left = _find_culprits(model, example, answering)
        if len(answering) - len(left) > len(groups) - len(culprits):
            groups, culprits = answering, left
    return groups.without(culprits)


def _is_sound(rehearsal: Rehearsal, model: nn.Module, example: Example, groups: Groups) -> bool:
    """Tell whether all groups can go down to one unit, and lose unequal shares without a change in the outputs.

    So it is with most models, and then nothing that breaks need be looked for.
    """
    if not rehearsal.survives(groups, {i: 1 for i, group in enumerate(groups) if group.size > 1}):
        return False
    lively = _prepare_trial(model, example, groups)
    if lively is None:
        return rehearsal.survives(groups, dict(enumerate(_unequal_shares(groups))))
    return lively.is_exact(lively.losing)


def _rehearse_shapes(rehearsal: Rehearsal, groups: Groups) -> Groups:
    """Keep the groups that break the model's code when they lose units, and find how many others need.

    Layers whose code asks for sizes of such groups answer it, if that saves groups.
    """
    lefts = _unequal_shares(groups)

    def suspects() -> set[int]:
        return rehearsal.suspects(groups)

    groups, is_fine = _let_answer(rehearsal, groups, lefts)
    broken: list[int] = []
    if not is_fine:
        losing = [i for i, group in enumerate(groups) if group.size > 1]
        broken = find_broken(
            lambda chosen: rehearsal.survives(groups, {i: lefts[i] for i in chosen}),
            losing,
            kinds=groups.kinds,
            suspects=suspects,
        )
        groups, broken = _save_by_answers(rehearsal, groups, lefts, losing, broken)
    if broken:
        lefts = [left for i, left in enumerate(lefts) if i not in broken]
        groups = groups.without(dict.fromkeys(broken, BREAKS))

    def survives_with(units: int) -> Survives:
        return lambda chosen: rehearsal.survives(groups, {i: min(units, lefts[i]) for i in chosen})

    kinds = groups.kinds
    losing = [i for i, left in enumerate(lefts) if left > 1]
    fragile = find_broken(survives_with(1), losing, kinds=kinds, suspects=suspects)
    need_more = set(find_broken(survives_with(2), fragile, kinds=kinds, suspects=suspects))
    return groups.bounded({i: lefts[i] if i in need_more else 2 for i in fragile})


def _let_answer(rehearsal: Rehearsal, groups: Groups, lefts: Sequence[int]) -> tuple[Groups, bool]:
    """Let layers that raise answer what their code asks for, if all groups survive then. Returns whether they do.

    That takes a few tries; a search for the groups that break takes dozens.
    """
    losing = {i: lefts[i] for i, group in enumerate(groups) if group.size > 1}
    hopeful = groups
    for _ in range(ANSWERS):
        if rehearsal.survives(hopeful, losing):
            return hopeful, True
        kinds = {groups.kinds[i] for i in rehearsal.suspects(hopeful)}
        more = hopeful.letting_answer([i for i, kind in enumerate(groups.kinds) if kind in kinds])
        if more.answering == hopeful.answering:
            break
        hopeful = more
    return groups, False


def _save_by_answers(
    rehearsal: Rehearsal, groups: Groups, lefts: Sequence[int], losing: Sequence[int], broken: Sequence[int]
) -> tuple[Groups, list[int]]:
    """Let layers answer what they ask of broken groups, kind by kind beside fine ones; return which stay broken."""
    answering = groups.letting_answer(broken)
    if answering.answering == groups.answering:
        return groups, list(broken)
    fine = sorted(set(losing) - set(broken))
    for kind in dict.fromkeys(groups.kinds[i] for i in broken):
        hopeful = [*fine, *(i for i in broken if groups.kinds[i] == kind)]
        if rehearsal.survives(answering, {i: lefts[i] for i in sorted(hopeful)}):
            fine = hopeful
    still = sorted(set(broken) - set(fine))
    return (answering, still) if len(still) < len(broken) else (groups, still)


def _find_culprits(model: nn.Module, example: Example, groups: Groups) -> dict[int, str]:
    """Find the groups whose removal changes the outputs of the model with lively weights, and the reason for each."""
    lively = _prepare_trial(model, example, groups)
    culprits = lively.find_culprits() if lively else {}
    return culprits if lively and culprits and lively.is_repeatable() else {}


def _prepare_trial(model: nn.Module, example: Example, groups: Groups) -> Trial | None:
    """Prepare a trial in which groups lose unequal shares of their units. None if it would take too long."""
    random = np.random.default_rng(0)
    alive: Flags = np.ones(groups.units, bool)
    for group, left in zip(groups, _unequal_shares(groups)):
        alive[group.start + random.permutation(group.size)[max(left, group.least) :]] = False
    return None if alive.all() else make_lively(model, example, groups, alive)


def _unequal_shares(groups: Groups) -> list[int]:
    """Return how many units of each group survive: as different as possible among groups of one size."""
    lefts = []
    for i, group in enumerate(groups):
        most = max(1, group.size - 1)
        lefts.append(1 + int((0.5 + i * SHARES) % 1 * most) if group.size > 2 else most)
    return lefts

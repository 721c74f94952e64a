"""Choose which units to remove so that the cost just meets a limit. Nothing here touches the model."""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from dpm_cli.errors import TargetError, listing
from dpm_cli.graph import Cost, Groups
from dpm_cli.graph.labels import Flags, Ids
from dpm_cli.method.trade import take_least_lost
from dpm_cli.recipe.values import CostKind


class Measure(Protocol):
    """A cost that grows with every width; `str` names it in messages."""

    def count(self, cost: Cost, alive: Flags) -> int: ...  # alive: (units,)


Kind = CostKind | Measure
BYTES = 4  # of a float32 weight
Scores = npt.NDArray[np.floating]
Weights = npt.NDArray[np.floating]


@dataclass(frozen=True)
class WidthLimits:
    """Limits how far each group may shrink; fixed for a whole run."""

    least: Ids  # (groups,) the smallest number of units a group may keep
    step: Ids  # (groups,) the number of survivors is a multiple of this, unless all survive
    sizes: Ids  # (groups,) units in the dense model

    def lowest(self, groups: Groups) -> Flags:
        """Return (units,) a smallest allowed set of survivors. Any units will do: cost depends only on counts."""
        alive = np.zeros(groups.units, bool)
        for group, units in zip(groups, self.least.tolist()):
            alive[group.start : group.start + min(units, group.size)] = True
        return alive

    def without(self, groups: Collection[int]) -> "WidthLimits":
        """Return the limits of the other groups."""
        return WidthLimits(*(np.delete(each, list(groups)) for each in (self.least, self.step, self.sizes)))

    def are_widths_allowed(self, present: Ids) -> Flags:
        """Tell (groups,) whether each group is whole or a multiple of its step. present: (groups,) number of units"""
        allowed: Flags = (present == self.sizes) | (present % self.step == 0)
        return allowed


AUTO_STEPS = (8, 4, 2, 1)  # kernels on CPUs and GPUs are fastest at multiples of 8


def choose_round_to(
    groups: Groups, asked: int | Literal["auto"], *, min_keep: float, amounts: Mapping[CostKind, float]
) -> int:
    """Choose what widths must be multiples of. "auto": the largest power of two up to 8 that can meet all targets."""
    if asked != "auto":
        return asked
    everything = np.ones(groups.units, bool)
    limits = {kind: find_limit(cost_of(groups.cost, kind, everything), amount) for kind, amount in amounts.items()}
    for step in AUTO_STEPS:
        lowest = find_width_limits(groups, round_to=step, min_keep=min_keep).lowest(groups)
        if all(cost_of(groups.cost, kind, lowest) <= limit for kind, limit in limits.items()):
            return step
    return AUTO_STEPS[0]  # no step can reach the target


def find_width_limits(groups: Groups, *, round_to: int, min_keep: float) -> WidthLimits:
    """Find how far each group may shrink.

    round_to: surviving channels are a multiple of it. min_keep: fraction of each group that always stays.
    """
    sizes = np.array([group.size for group in groups], np.int64)
    step = np.array([round_to // math.gcd(round_to, group.channels_per_unit) for group in groups], np.int64)
    least = np.array([group.least for group in groups], np.int64)
    fewest = np.maximum(least, np.ceil(sizes * min_keep - 1e-9).astype(np.int64))
    return WidthLimits(np.minimum(sizes, -(-fewest // step) * step), step, sizes)


def rank(scores: Scores) -> Scores:
    """Rank (units,) scores from 0 for the lowest; equal ones in their order."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    return ranks


def cost_of(cost: Cost, kind: Kind, alive: Flags) -> int:
    """Return the cost of a set of survivors, in the unit of its kind. alive: (units,)"""
    match kind:
        case "macs":
            return cost.macs(alive)
        case "params":
            return cost.parameters(alive)
        case "channels":
            return int(alive.sum())
        case "size":
            return BYTES * cost.parameters(alive)
        case _:
            return kind.count(cost, alive)


def show_cost(kind: Kind, cost: int) -> str:
    """Write a cost with its unit: milliseconds for latency, numbers in full for all others."""
    if str(kind) == "latency":
        return f"{cost / 1e6:.3g} ms"
    return f"{cost:,} bytes" if kind == "size" else f"{cost:,}"


@dataclass(frozen=True)
class Several:
    """Several limits at once, as one cost: the largest share of a limit that is used, in billionths."""

    limits: tuple[tuple[Kind, int], ...]
    WHOLE: ClassVar[int] = 10**9  # all limits hold up to here

    def count(self, cost: Cost, alive: Flags) -> int:
        return max(-(-cost_of(cost, kind, alive) * self.WHOLE // limit) for kind, limit in self.limits)

    def __str__(self) -> str:
        return " and ".join(str(kind) for kind, _ in self.limits)


def find_limit(dense: int, amount: float) -> int:
    """Return the largest allowed cost. amount: a fraction of the dense cost if below 1, else an absolute number."""
    return math.floor(dense * amount * (1 + 1e-12)) if amount < 1 else math.floor(amount)  # 0.29 of 100 is 29


def resolve_limit(groups: Groups, widths: WidthLimits, *, kind: Kind, amount: float) -> int:
    """Return the largest cost that meets the target; amount as in `find_limit`.

    Raises TargetError with the achievable range when no allowed set of survivors meets it.
    """
    dense = cost_of(groups.cost, kind, np.ones(groups.units, bool))
    lowest = cost_of(groups.cost, kind, widths.lowest(groups))
    limit = find_limit(dense, amount)
    least, most, wanted = (show_cost(kind, each) for each in (lowest, dense, limit))
    asked = f"{amount:g} ({wanted})" if amount < 1 else wanted
    if limit >= dense:
        raise TargetError(f"target {kind} {asked} keeps everything: the dense model has {most}; ask for less than that")
    if limit < lowest:
        raise TargetError(
            f"target {kind} {asked} cannot be met: between {least} ({lowest / dense:.3f}) "
            f"and {most} can be reached with this round_to, min_keep and keep; raise the target or lower them"
            + _explain_kept(groups)
        )
    return limit


def _explain_kept(groups: Groups) -> str:
    """Name the most frequent reason for keeping layers whole, and a layer; "" if only the output is kept."""
    inner = [kept for kept in groups.kept if kept.reason.rpartition(": ")[2] != "output of the model"]
    if not inner:
        return ""
    ((reason, _),) = Counter(kept.reason.rpartition(": ")[2] for kept in inner).most_common(1)
    layers = (kept.layer for kept in inner if kept.reason.rpartition(": ")[2] == reason)
    return f". Kept whole: {listing(layers, shown=1)} ({reason})"


MOST_SPARED = 8  # dear steps of width that `choose_victims` tries to do without


def choose_victims(
    groups: Groups,
    widths: WidthLimits,
    scores: Scores,
    weights: Weights | None = None,
    *,
    kind: Kind,
    limit: int,
    alive: Flags | None = None,
    eligible: Flags | None = None,
    traded: bool = False,
) -> Flags:
    """Choose (units,) low-scored units whose removal brings the cost to the limit, and no further than it must.

    Ranks globally and takes the first set that meets the limit. For latency, whose steps of width save so differently,
    and where it is asked for (`traded`), takes those that lose least per cost saved instead (`trade`). The last step of
    width may be a dear one, say of a residual stage, which leaves room below the limit: victims then come back, best
    scores first, while a step of width fits. A ranked choice is compared with what leaving out that step would choose:
    the lower sum of scores wins. So one more unit in any group (or one step of `round_to`) would miss the limit. If the
    eligible units are too few, all removable ones are chosen. A group that releases left between two allowed widths
    always loses the excess.

    scores: (units,) low is redundant. alive: (units,) units still present. eligible: (units,) units that may be chosen.
    weights: (groups,) what the scores of each group are multiplied by where they are summed to a loss.
    traded: the scores are losses, which add up.
    """
    alive = np.ones(groups.units, bool) if alive is None else alive
    eligible = alive if eligible is None else alive & eligible

    def fits(victims: Flags) -> bool:
        return cost_of(groups.cost, kind, alive & ~victims) <= limit

    losses = scores if traded else scores - scores[eligible].min(initial=np.inf)
    if traded or _is_traded(kind):
        losses = losses if weights is None else losses * weights[groups.group_of_unit]
        steps, must_go = _find_steps(groups, widths, scores, alive, eligible)
        victims = must_go | take_least_lost(
            steps, losses, lambda left: _find_excess(groups.cost, kind, limit, left), alive & ~must_go
        )
        return _give_back(groups, widths, losses, fits, alive, victims)
    best, dear = _take_lowest(groups, widths, scores, fits, alive, eligible)
    best = _give_back(groups, widths, scores, fits, alive, best)
    for _ in range(MOST_SPARED):
        if not dear.any():
            break
        eligible = eligible & ~dear
        other, dear = _take_lowest(groups, widths, scores, fits, alive, eligible)
        other = _give_back(groups, widths, scores, fits, alive, other)
        if not fits(other) or losses[other].sum() >= losses[best].sum():
            break
        best = other
    return best


def _is_traded(kind: Kind) -> bool:
    """Tell whether a cost changes so unevenly with the widths that units are chosen by what they save, too."""
    kinds = [each for each, _ in kind.limits] if isinstance(kind, Several) else [kind]
    return any(str(each) == "latency" for each in kinds)


def _find_excess(cost: Cost, kind: Kind, limit: int, alive: Flags) -> float:
    """Add up by how much of each limit the survivors are above it."""
    limits = kind.limits if isinstance(kind, Several) else [(kind, limit)]
    shares = (cost_of(cost, each, alive) / limit for each, limit in limits)
    return sum(max(0.0, share - 1) for share in shares)


def _find_steps(
    groups: Groups, widths: WidthLimits, scores: Scores, alive: Flags, eligible: Flags
) -> tuple[list[list[Ids]], Flags]:
    """Return each group's candidates, lowest scores first, cut where a width is allowed; and (units,) what must go.

    A group that releases left between two allowed widths loses the excess in any case.
    """
    present = np.bincount(groups.group_of_unit[alive], minlength=len(groups))
    width_allowed, must_go = widths.are_widths_allowed(present), np.zeros(groups.units, bool)
    found = []
    for number, group in enumerate(groups):
        own = group.start + np.flatnonzero(eligible[group.range])
        own = own[np.argsort(scores[own], kind="stable")]
        left = present[number] - np.arange(1, len(own) + 1)  # survivors after each removal
        ends = np.flatnonzero((left % widths.step[number] == 0) & (left >= widths.least[number])) + 1
        steps = np.split(own, ends)[:-1]
        if steps and not width_allowed[number]:
            must_go[steps.pop(0)] = True
        found.append(steps)
    return found, must_go


def _take_lowest(
    groups: Groups, widths: WidthLimits, scores: Scores, fits: Callable[[Flags], bool], alive: Flags, eligible: Flags
) -> tuple[Flags, Flags]:
    """Return (units,) the first set in order of score that fits, and the units that may not be taken to avoid its last.

    The latter are those of the last step of width, with all units of its group that were not taken; none if there is no
    such step, or if nothing fits.
    """
    candidates = np.flatnonzero(eligible)
    candidates = candidates[np.argsort(scores[candidates], kind="stable")]
    rank = np.empty(groups.units, np.int64)
    rank[candidates] = np.arange(len(candidates))

    # A unit goes once its group has lost enough others to reach an allowed width. Find the rank where that happens.
    never = len(candidates)
    turn = np.full(groups.units, never)
    steps, must_go = _find_steps(groups, widths, scores, alive, eligible)
    for units in itertools.chain.from_iterable(steps):
        turn[units] = rank[units[-1]]
    turn[must_go] = -1

    def taken(turns: int) -> Flags:
        victims: Flags = turn <= turns
        return victims

    turns = np.append(-1, np.unique(turn[(turn >= 0) & (turn < never)]))
    low, high = 0, len(turns) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(taken(int(turns[middle]))):
            high = middle
        else:
            low = middle + 1
    victims, dear = taken(int(turns[low])), np.zeros(groups.units, bool)
    if low and fits(victims):
        last = groups.group_of_unit == groups.group_of_unit[candidates[int(turns[low])]]
        dear = last & eligible & ~taken(int(turns[low - 1]))
    return victims, dear


def _give_back(
    groups: Groups, widths: WidthLimits, scores: Scores, fits: Callable[[Flags], bool], alive: Flags, victims: Flags
) -> Flags:
    """Take back (units,) victims, the best scores first, as long as a step of width in any group fits."""
    victims = victims.copy()
    if not fits(victims):
        return victims
    present = np.bincount(groups.group_of_unit[alive & ~victims], minlength=len(groups))

    def next_step(number: int) -> tuple[float, int, Ids] | None:
        """Find the best-scored victims of a group that make its next allowed width; None if there is none."""
        own = np.flatnonzero(victims & (groups.group_of_unit == number))
        wider = present[number] + np.arange(1, len(own) + 1)
        allowed = np.flatnonzero((wider % widths.step[number] == 0) | (wider == widths.sizes[number]))
        if not len(allowed):
            return None
        back = own[np.argsort(scores[own], kind="stable")][::-1][: allowed[0] + 1]
        return -float(scores[back].mean()), number, back

    steps = [step for number in np.unique(groups.group_of_unit[victims]).tolist() if (step := next_step(number))]
    heapq.heapify(steps)
    while steps:  # what does not fit now never will, because costs only grow with the other widths
        _, number, back = heapq.heappop(steps)
        victims[back] = False
        if not fits(victims):
            victims[back] = True
            continue
        present[number] += len(back)
        if following := next_step(number):
            heapq.heappush(steps, following)
    return victims

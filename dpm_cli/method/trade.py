"""Choose units by what is lost per cost that is saved, for costs that do not simply grow with the number of units.

A runtime computes channels in blocks, so a narrower layer may be no faster, and half of it twice as fast. Ranking units
by score alone takes the first kind as gladly as the second. HALP (Shen et al., NeurIPS 2022) solves the same as a
knapsack over a table of latencies; here it is filled greedily, several steps of width of one group at a time.
"""

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from dpm_cli.graph.labels import Flags, Ids

MOST_OPTIONS = 10  # widths of one group that are compared, closer to the present one
Losses = npt.NDArray[np.floating]
Option = tuple[float, int, int]  # what is lost per excess saved, group, steps of width that are gone then


def take_least_lost(
    steps: Sequence[Sequence[Ids]], losses: Losses, excess: Callable[[Flags], float], alive: Flags
) -> Flags:
    """Return (units,) victims whose removal brings the excess to zero, or all that there are.

    steps: of each group, the units that go together, those that go first first. losses: (units,), not negative; they
    are summed. excess: by how much a set of survivors (units,) is above the limits; it falls when units go.
    """
    left, gone, now = alive.copy(), [0] * len(steps), excess(alive)

    def weigh(group: int) -> Option | None:
        """Find the best number of steps to take from a group now; None if none saves anything."""
        first, last = gone[group], len(steps[group])
        if first == last:
            return None
        ends = first + np.unique(np.geomspace(1, last - first, min(MOST_OPTIONS, last - first)).round().astype(int))
        best, then, lost, at = None, left.copy(), 0.0, first
        for end in ends.tolist():
            for units in steps[group][at:end]:
                then[units] = False
                lost += float(losses[units].sum())
            at = end
            saved = now - excess(then)
            if saved > 0 and (best is None or lost / saved < best[0]):
                best = (lost / saved, group, end)
        return best

    options = [option for group in range(len(steps)) if (option := weigh(group))]
    heapq.heapify(options)
    while options and now > 0:
        group = heapq.heappop(options)[1]
        if (option := weigh(group)) is None:  # what it saves depends on the other widths, which have changed
            continue
        if options and option > options[0]:
            heapq.heappush(options, option)
            continue
        _, _, end = option
        left[np.concatenate(steps[group][gone[group] : end])] = False
        gone[group], now = end, excess(left)
        if option := weigh(group):
            heapq.heappush(options, option)
    return alive & ~left

"""Choose units to remove as slowly and plainly as can be."""


def choose_plainly(scores, fits, may_go):
    """Take units from the lowest score on until the rest fits, then give back the best ones that still fit.

    The last unit taken may have cost more than was needed: what would be taken without it and its like is tried too,
    and the lower sum of scores wins. scores: {(group, unit): score}. fits: set of units -> bool.
    may_go: (unit, taken) -> bool.
    """
    order, lowest, best = sorted(scores, key=scores.get), min(scores.values(), default=0), None
    while True:
        taken = []
        for unit in order:
            if fits(set(taken)):
                break
            if may_go(unit, set(taken)):
                taken.append(unit)
        last, met = taken[-1:], fits(set(taken))
        for unit in reversed(taken.copy()) if met else ():
            if fits(set(taken) - {unit}):
                taken.remove(unit)
        loss = sum(scores[unit] - lowest for unit in taken)
        if best and (not met or loss >= best[0]):
            return best[1]
        best = loss, set(taken)
        if not met or not last:
            return best[1]
        place = order.index(last[0])
        order = [unit for rank, unit in enumerate(order) if rank < place or unit[0] != last[0][0]]

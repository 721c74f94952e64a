"""Find which of many candidates break something, with few tries."""

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence

Survives = Callable[[Sequence[int]], bool]  # tells whether these candidates can go together
Suspects = Callable[[], Collection[int]]  # names candidates that may have caused the last failure
TRIES = 64  # a model with more culprits than these find has a rule or a habit to blame, so it loses many at once
SAMPLES = 4  # of one kind: if these break alone, all do


def find_broken(
    survives: Survives,
    candidates: Sequence[int],
    *,
    kinds: Sequence[Hashable] | None = None,
    suspects: Suspects | None = None,
    tries: int = TRIES,
) -> list[int]:
    """Find the candidates that do not survive alone; and of the others, as many as it takes until they do together.

    Assumes that what survives goes on surviving when a candidate less takes part. kinds: the kind of every number up to
    the largest candidate. What repeats in a model breaks in every repetition, so kinds are looked for first; if some
    members of one break alone, the others are not tried. suspects: asked after a failure, which saves most of the
    search. tries: after this many calls of `survives`, all candidates that might be meant are taken to be broken.
    """
    left = iter(range(tries))

    def survives_in_time(chosen: Sequence[int]) -> bool:
        return next(left, None) is not None and survives(chosen)

    if not candidates or survives_in_time(candidates):
        return []
    members: dict[Hashable, list[int]] = {}
    for i in candidates:
        members.setdefault(i if kinds is None else kinds[i], []).append(i)
    fine: list[list[int]] = list(members.values())
    doubtful = _drop_suspects(survives_in_time, fine, suspects) if suspects else fine
    beside = _all_of(fine) if suspects else []
    return sorted(_find_broken_of_kinds(survives_in_time, doubtful, beside, suspects or (lambda: ())))


def _all_of(kinds: Iterable[list[int]]) -> list[int]:
    return sorted(i for kind in kinds for i in kind)


def _drop_suspects(survives: Survives, fine: list[list[int]], suspects: Suspects) -> list[list[int]]:
    """Move kinds out of `fine`, which has just failed, until the rest survives. Returns these kinds.

    If a failure names none, all are moved.
    """
    dropped: list[list[int]] = []
    while fine:
        named = set(suspects())
        dropping = [kind for kind in fine if named & set(kind)] or list(fine)
        dropped += dropping
        fine[:] = [kind for kind in fine if kind not in dropping]
        if fine and survives(_all_of(fine)):
            break
    return dropped


def _find_broken_of_kinds(
    survives: Survives, kinds: Sequence[list[int]], fine: list[int], suspects: Suspects
) -> Iterable[int]:
    """Find the broken ones among candidates that do not survive together, beside others that do."""

    def with_fine(chosen: Sequence[int]) -> list[int]:
        return sorted([*fine, *(i for kind in chosen for i in kinds[kind])])

    broken = _find_broken(lambda chosen: survives(with_fine(chosen)), range(len(kinds)))
    fine = with_fine([kind for kind in range(len(kinds)) if kind not in broken])
    for kind in broken:
        found = _find_broken_members(survives, kinds[kind], fine, suspects)
        yield from found
        fine = sorted([*fine, *(i for i in kinds[kind] if i not in found)])


def _find_broken_members(survives: Survives, members: list[int], fine: list[int], suspects: Suspects) -> list[int]:
    """Find the broken ones of one kind, which does not survive beside those that are fine."""
    if len(members) == 1:
        return members
    some = [members[k * (len(members) - 1) // (SAMPLES - 1)] for k in range(SAMPLES)]
    if len(members) > SAMPLES and not any(survives([i]) for i in some):
        return members
    rest, doubtful = list(members), list[int]()
    while rest and not survives(sorted([*fine, *rest])):
        if not (named := set(suspects()).intersection(rest)):
            return _find_broken(lambda chosen: survives(sorted([*fine, *chosen])), members)
        doubtful += sorted(named)
        rest = [i for i in rest if i not in named]
    broken = []
    for i in doubtful:
        if survives(sorted([*fine, *rest, i])):
            rest.append(i)
        else:
            broken.append(i)
    return broken


def _find_broken(survives: Survives, candidates: Sequence[int]) -> list[int]:
    """Find the broken ones among candidates that do not survive together."""
    broken = list(_find_broken_alone(survives, candidates))
    rest = [i for i in candidates if i not in broken]
    while rest and not survives(rest):
        low, high = 0, len(rest)  # rest[:low] survives, rest[:high] does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if survives(rest[:middle]) else (low, middle)
        broken.append(rest.pop(low))
    return sorted(broken)


def _find_broken_alone(survives: Survives, candidates: Sequence[int]) -> Iterable[int]:
    """Find those that do not survive alone by halving `candidates`, which do not survive together."""
    if len(candidates) == 1:
        yield from candidates
        return
    middle = len(candidates) // 2
    for part in (candidates[:middle], candidates[middle:]):
        if not survives(part):
            yield from _find_broken_alone(survives, part)

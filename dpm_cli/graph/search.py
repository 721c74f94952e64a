"""Find which of many candidates break something, with few tries."""

from collections.abc import Callable, Iterable, Sequence

Survives = Callable[[Sequence[int]], bool]  # tells whether these candidates can go together
TRIES = 64  # a model with more culprits than these find has a rule or a habit to blame, so it loses many at once


def find_broken(survives: Survives, candidates: Sequence[int], tries: int = TRIES) -> list[int]:
    """Find the candidates that do not survive alone; and of the others, as many as it takes until they do together.

    Assumes that what survives goes on surviving when a candidate less takes part. tries: after so many calls of
    `survives`, all candidates that might be meant are taken to be broken.
    """
    left = iter(range(tries))

    def survives_in_time(chosen: Sequence[int]) -> bool:
        return next(left, None) is not None and survives(chosen)

    return _find_broken(survives_in_time, candidates)


def _find_broken(survives: Survives, candidates: Sequence[int]) -> list[int]:
    if not candidates or survives(candidates):
        return []
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

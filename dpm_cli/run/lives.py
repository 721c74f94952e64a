"""Watch the lives of units: how many decay, and the norms of a few. Nothing here changes them."""

import numpy as np

from dpm_cli.events import UnitsWatched
from dpm_cli.method.pruning import Pruning

LOOKS = 20  # during one decay
SAMPLE = 12  # units of a round whose norms are told


def is_due(pruning: Pruning, step: int) -> bool:
    """Tell whether to look at this step; more often would only fill metrics.jsonl."""
    return pruning.in_round and step % max(1, pruning.decay.steps // LOOKS) == 0


def watch_units(pruning: Pruning, *, stage: str, step: int) -> UnitsWatched:
    """Count the units in each phase of their lives, and read some norms. Waits for the device."""
    decay = pruning.decay
    original = pruning.ancestry.units  # numbers of the dense model's units
    in_round = (decay.decaying | decay.dead | decay.released).cpu().numpy()
    order = np.argsort(original * 2_654_435_761 % 2**32, kind="stable")  # scattered, and the same at every look
    sample = order[in_round[order]][:SAMPLE]
    freed = decay.released.cpu().numpy()
    norms, initial = decay.norms.cpu().numpy(), decay.initial.cpu().numpy()
    return UnitsWatched(
        stage=stage,
        step=step,
        round=pruning.round,
        decaying=int(decay.decaying.sum()),
        dead=int(decay.dead.sum()),
        released=pruning.released + int(decay.released.sum()),
        removed=int((~pruning.ancestry.survivors).sum()),
        freed=tuple(str(original[unit]) for unit in sample if freed[unit]),
        norms={
            str(original[unit]): round(float(norms[unit] / initial[unit]), 4) for unit in sample if initial[unit] > 0
        },
    )

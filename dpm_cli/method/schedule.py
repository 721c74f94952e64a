"""Plan the rounds of a run from its settings, and name settings that would fit if these do not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dpm_cli.errors import RecipeError
from dpm_cli.method.pruners import make_base
from dpm_cli.method.rounds import Rounds
from dpm_cli.recipe.sections import Decay, Prune, Training
from dpm_cli.recipe.stages import number_epochs

MOST_EPOCHS = 1 << 20
ENDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # to try as prune.end
CUTS_AT_ONCE = "decay.steps: 1"
SHOWN = 3  # ways out that a message names


def plan_schedule(
    prune: Prune, training: Training, decay: Decay, *, steps_per_epoch: int, epochs: str = "train.epochs"
) -> Rounds:
    """Plan the rounds of a run. Raises RecipeError that names values that would fit.

    training: settings of the main stage that prunes. epochs: what the user calls its length.
    """
    settings = _Settings(prune, training, decay, steps_per_epoch)
    try:
        return settings.plan()
    except RecipeError as error:
        ways_out = list(_find_ways_out(settings, epochs)) or list(_find_larger_changes(settings, epochs))
        ways_out.sort(key=CUTS_AT_ONCE.__eq__)  # last, because nothing decays then
        way_out = f": set {', or '.join(ways_out[:SHOWN])}" if ways_out else ""
        raise RecipeError(f"{error}{way_out}") from None


@dataclass(frozen=True)
class _Settings:
    """Holds what a schedule depends on."""

    prune: Prune
    training: Training
    decay: Decay
    steps_per_epoch: int

    def plan(self) -> Rounds:
        base = make_base(self.prune, self.training, seed=0)  # the seed changes no schedule
        return base.rounds(number_epochs(base.stages()), self.decay, steps_per_epoch=self.steps_per_epoch)

    def fit(self, section: str, **changes: Any) -> bool:
        """Tell whether a schedule fits with these changes of one section."""
        return self.changed(section, **changes).fits

    def changed(self, section: str, **changes: Any) -> "_Settings":
        parts: dict[str, Any] = {"prune": self.prune, "training": self.training, "decay": self.decay}
        parts[section] = parts[section].model_copy(update=changes)
        return _Settings(**parts, steps_per_epoch=self.steps_per_epoch)

    def with_epochs(self, epochs: int) -> bool:
        return self.fit("training", epochs=epochs)

    @property
    def fits(self) -> bool:
        try:
            self.plan()
        except RecipeError:
            return False
        return True


def _find_ways_out(settings: _Settings, epochs: str) -> Iterator[str]:
    """Yield changes that were tried and fit, mild ones first."""
    prune, decay, training, gates = settings.prune, settings.decay, settings.training, settings.prune.gates
    if decay.steps != "auto" and (most := _largest(decay.steps, lambda n: settings.fit("decay", steps=n))):
        yield f"decay.steps: {most}"
    if prune.rounds != "auto" and (most := _largest(prune.rounds, lambda n: settings.fit("prune", rounds=n))):
        yield f"prune.rounds: {most}"
    if least := _smallest(training.epochs, settings.with_epochs):
        yield f"{epochs}: {least}"
    if settings.changed("decay", steps="auto").fit("prune", rounds="auto"):
        yield "decay.steps: auto and prune.rounds: auto"
    if end := next((end for end in _other_ends(prune) if settings.fit("prune", end=end)), None):
        yield f"prune.end: {end}"
    if prune.base == "gate-decorator" and (
        least := _smallest(
            gates.tick_epochs,
            lambda n: settings.fit("prune", gates=gates.model_copy(update={"tick_epochs": n})),
        )
    ):
        yield f"prune.gates.tick_epochs: {least}"


def _find_larger_changes(settings: _Settings, epochs: str) -> Iterator[str]:
    """Yield a change of everything that has a say, for settings that no single change makes fit."""
    settings = settings.changed("decay", steps="auto").changed("prune", rounds="auto")
    for end in (settings.prune.last, *_other_ends(settings.prune)):
        moved = settings.changed("prune", end=end)
        least = settings.training.epochs if moved.fits else _smallest(settings.training.epochs, moved.with_epochs)
        if least is not None:
            changes = [f"prune.end: {end:g}", "decay.steps: auto", "prune.rounds: auto"]
            yield " and ".join([*changes, f"{epochs}: {least}"])
            return


def _other_ends(prune: Prune) -> list[float]:
    """List what else prune.end could be, the nearest first."""
    return sorted((end for end in ENDS if prune.start < end), key=lambda end: abs(end - prune.last))


def _largest(above: int, fits: Callable[[int], bool]) -> int | None:
    """Find the largest number below `above` that fits, if all smaller ones do too."""
    low, high = 0, above  # `low` fits or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None


def _smallest(below: int, fits: Callable[[int], bool]) -> int | None:
    """Find a number above `below` that fits, the smallest if all larger ones do too."""
    low, high = below, max(1, 2 * below)
    while not fits(high):
        low, high = high, 2 * high
        if high > MOST_EPOCHS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high

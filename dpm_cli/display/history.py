"""Read what happened in a run from its metrics.jsonl, on one axis of steps over all stages."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dpm_cli.events import EpochEnded, Event, Mistaken, Resumed, RoundStarted, UnitsRemoved, UnitsWatched
from dpm_cli.files import open_regular

Entry = dict[str, Any]
LONGEST_LINE = 8 << 20  # bytes


class Axis:
    """Puts the steps of all stages on one axis.

    A stage may have the name of the one before it: it has begun when the step falls, or an epoch ends at the same step.
    """

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []  # name, and step on the axis at which it began
        self._last = self._ended = 0  # within the stage: the last step, and the one at which an epoch ended

    def resume(self, event: Resumed) -> None:
        """Go on where a run was stopped."""
        self.stages, self._last, self._ended = [(event.stage, event.before)], event.step, event.step

    def place(self, stage: str, step: int, *, ends_epoch: bool) -> int:
        """Return the place of a step of a stage. Call for all events in order."""
        name, began = self.stages[-1] if self.stages else (None, 0)
        if stage != name or step < self._last or (ends_epoch and step == self._ended):
            began, self._ended = began + self._last, 0
            self.stages.append((stage, began))
        self._last = step
        if ends_epoch:
            self._ended = step
        return began + step


@dataclass
class History:
    """Holds the events of a run by kind, each with `at`, its step over all stages."""

    epochs: list[Entry] = field(default_factory=list)
    rounds: list[Entry] = field(default_factory=list)
    units: list[Entry] = field(default_factory=list)
    removals: list[Entry] = field(default_factory=list)
    mistakes: list[Entry] = field(default_factory=list)
    stages: list[tuple[str, int]] = field(default_factory=list)  # name, and step at which it began

    @property
    def steps(self) -> int:
        return max((entry["at"] for entry in (*self.epochs, *self.units, *self.removals)), default=0)


def read_history(path: Path) -> History:
    """Read as much as there is: of a missing file, of damaged lines and of those of other versions nothing is shown."""
    history = History()
    kinds: dict[type[Event], list[Entry]] = {
        EpochEnded: history.epochs,
        RoundStarted: history.rounds,
        UnitsWatched: history.units,
        UnitsRemoved: history.removals,
        Mistaken: history.mistakes,
    }
    whole = {kind.kind: ({each.name for each in fields(kind)}, entries) for kind, entries in kinds.items()}
    axis = Axis()
    for entry in _read_entries(path):
        needed, entries = whole.get(str(entry.get("event")), (set(), []))
        if not needed <= entry.keys():
            continue
        if "step" in needed:
            stage, step = entry["stage"], entry["step"]
            if not (isinstance(stage, str) and isinstance(step, int)):
                continue
            entry["at"] = axis.place(stage, step, ends_epoch=entries is history.epochs)
        entries.append(entry)
    history.stages = axis.stages
    return history


def _read_entries(path: Path) -> Iterator[Entry]:
    with contextlib.suppress(OSError), open_regular(path) as file:
        while line := file.readline(LONGEST_LINE):
            try:
                entry = json.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry

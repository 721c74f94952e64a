"""Read what happened in a run from its metrics.jsonl, on one axis of steps over all stages."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dpm_cli.events import EpochEnded, Event, Mistaken, RoundStarted, UnitsRemoved, UnitsWatched
from dpm_cli.files import open_regular

Entry = dict[str, Any]
LONGEST_LINE = 8 << 20  # bytes


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
    offset = last = 0
    stage = ""
    for entry in _read_entries(path):
        name, step = entry.get("stage"), entry.get("step")
        if isinstance(name, str) and isinstance(step, int):
            if name != stage:
                offset, stage, last = offset + last, name, 0
                history.stages.append((name, offset))
            last = max(last, step)
            entry["at"] = offset + step
        needed, entries = whole.get(str(entry.get("event")), (set(), []))
        if needed <= entry.keys():
            entries.append(entry)
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

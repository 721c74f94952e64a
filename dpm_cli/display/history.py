"""Read what happened in a run from its metrics.jsonl, on one axis of steps over all stages."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


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
    """Read as much as there is: without the file, or with damaged lines, less is shown."""
    history = History()
    kinds = {
        "epoch": history.epochs,
        "round": history.rounds,
        "units": history.units,
        "compact": history.removals,
        "mistake": history.mistakes,
    }
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
        if entry.get("event") in kinds:
            kinds[entry["event"]].append(entry)
    return history


def _read_entries(path: Path) -> Iterator[Entry]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry

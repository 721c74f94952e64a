"""What every benchmark shares: turns, medians, a table, a JSON file with hardware and versions."""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dpm_cli.measure import hardware

FOLDER = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


def time_in_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, contender by contender in each turn, so that a busy moment hits them all.

    clock: for calls of one thread on a busy machine `time.thread_time`, which stands still while others run.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-warm_up, turns):
        for name, call in contenders.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(clock() - started)
    return times


def paired_ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> float:
    """Median over the turns of one contender's time by another's in the same turn."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys as a Markdown table."""
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_show(row[column]) for column in columns) + " |", flush=True)


def save(name: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
    """Write rows, settings, hardware and versions to NAME.json, in $BENCHMARK_RESULTS or benchmarks/results."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"rows": rows, "settings": settings, "machine": hardware()}, indent=1) + "\n")
    return path


def read_rows(name: str, **settings: Any) -> list[dict[str, Any]]:
    """Return the rows of benchmarks/results/NAME.json; none if there is no such file or it has other settings."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        return []
    saved = json.loads(path.read_text())
    rows: list[dict[str, Any]] = saved["rows"]
    return rows if settings.items() <= saved["settings"].items() else []


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""One finished run as a row of `dpm compare`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpm_cli.display.reports import read_report
from dpm_cli.files import REPORT
from dpm_cli.report import Report


@dataclass(frozen=True)
class ComparedRun:
    """One finished run as a row; its fields are the columns of --csv and the keys of --json, in this order."""

    run: str  # what tells its folder from those of the others
    report: str
    arch: str | None
    base: str
    target: str  # macs | params | channels | size | latency | sparsity | drop
    asked: float
    met: bool
    macs_dense: int
    macs: int
    params_dense: int
    params: int
    accuracy_dense: float | None  # percent
    accuracy: float | None
    bytes: int
    faster_torch: float | None  # dense latency / slim latency
    faster_onnxruntime: float | None
    seconds: float
    seed: int
    device: str
    precision: str
    recipe_hash: str


def summarise_all(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read the reports of runs and name them. Raises OutputError for a file that is not a report."""
    files = [path / REPORT if path.is_dir() else path for path in paths]
    return [_flatten(file, name, read_report(file)) for file, name in zip(files, name_runs(files))]


def name_runs(files: Sequence[Path]) -> list[str]:
    """Name runs by the parts of their folders that differ: a/out and b/out are a and b."""
    folders = [file.resolve().parent.parts for file in files]
    if len(set(folders)) < 2:
        return [folder[-1] for folder in folders]
    shortest = min(map(len, folders))
    before = next((place for place in range(shortest) if len({folder[place] for folder in folders}) > 1), shortest - 1)
    ends = [folder[::-1] for folder in folders]
    after = next((place for place in range(shortest - before) if len({end[place] for end in ends}) > 1), 0)
    return ["/".join(folder[before : len(folder) - after]) for folder in folders]


def _flatten(path: Path, name: str, report: Report) -> ComparedRun:
    dense, slim, target = report.dense, report.slim, report.target
    return ComparedRun(
        run=name,
        report=str(path),
        arch=report.arch,
        base=report.base,
        target=target.kind,
        asked=target.asked,
        met=target.is_met,
        macs_dense=dense.macs,
        macs=slim.macs,
        params_dense=dense.params,
        params=slim.params,
        accuracy_dense=dense.accuracy,
        accuracy=slim.accuracy,
        bytes=slim.bytes,
        faster_torch=_faster(report, "torch"),
        faster_onnxruntime=_faster(report, "onnxruntime"),
        seconds=round(sum(report.seconds.values()), 2),
        seed=report.seed,
        device=report.device,
        precision=report.precision,
        recipe_hash=report.recipe_hash,
    )


def _faster(report: Report, runtime: str) -> float | None:
    """Divide dense latency by slim latency. Returns None if either was not measured."""
    before, after = (network.latency.get(runtime) for network in (report.dense, report.slim))
    return round(before.median / after.median, 3) if before and after and after.median else None

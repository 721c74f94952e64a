"""`dpm compare`: show many finished runs in one table."""

import csv
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.cli.options import AsJson
from dpm_cli.cli.outcome import print_json
from dpm_cli.errors import UsageError
from dpm_cli.report import Report


@dataclass(frozen=True)
class ComparedRun:
    """One finished run as a row; its fields are the columns of --csv and the keys of --json, in this order."""

    run: str  # the name of its folder
    report: str
    arch: str | None
    base: str
    target: str  # macs | params | channels | sparsity
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


def compare(
    reports: Annotated[list[Path], typer.Argument(metavar="REPORT...", help="report.json files, or their folders.")],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values, for a spreadsheet.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show many finished runs in one table.

    For example: dpm compare out/*/report.json
    """
    if as_csv and as_json:
        raise UsageError("--csv and --json contradict each other: give one of them")
    rows = [summarise(path) for path in reports]
    if as_json:
        print_json([asdict(row) for row in rows])
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, [field.name for field in fields(ComparedRun)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    else:
        from dpm_cli.cli.summaries import print_compared

        print_compared(rows)


def summarise(path: Path) -> ComparedRun:
    """Read the report of one run. Raises UsageError for a file that is not a report."""
    path = path / "report.json" if path.is_dir() else path
    try:
        return _flatten(path, dpm_cli.Report.from_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} is not the report of a run ({reason}): give report.json files of dpm prune") from None


def _flatten(path: Path, report: Report) -> ComparedRun:
    dense, slim, target = report.dense, report.slim, report.target
    return ComparedRun(
        run=path.resolve().parent.name,
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

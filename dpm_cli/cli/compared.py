"""One finished run as a row of `dpm compare`."""

from dataclasses import dataclass
from pathlib import Path

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


def summarise(path: Path) -> ComparedRun:
    """Read the report of one run. Raises UsageError for a file that is not a report."""
    path = path / "report.json" if path.is_dir() else path
    try:
        return _flatten(path, Report.from_json(path.read_text(encoding="utf-8")))
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

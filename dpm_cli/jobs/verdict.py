"""Tell whether a finished run kept what was asked of it."""

from dpm_cli.display import numbers
from dpm_cli.errors import AccuracyError, MissedError, TargetError
from dpm_cli.report import Report


def find_missed(report: Report) -> MissedError | None:
    """Return the error in which a run ends that broke its floor or missed a target; None if it kept both."""
    if report.floor and report.floor.is_broken:
        return AccuracyError(report.floor.text or "", report=report)
    missed = [each for each in report.targets or [report.target] if not each.is_met]
    if not missed:
        return None
    limits = " and ".join(f"{each.kind} ≤ {numbers.cost(each.kind, each.limit)}" for each in missed)
    left = " and ".join(numbers.cost(each.kind, each.reached) for each in missed)
    return TargetError(
        f"target {limits} is not met, because layers had to stay whole: {left} is left; the files hold that model",
        report=report,
    )

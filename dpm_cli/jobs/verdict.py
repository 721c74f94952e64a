"""Tell whether a finished run kept what was asked of it."""

from dpm_cli.display import numbers
from dpm_cli.errors import AccuracyError, MissedError, TargetError
from dpm_cli.report import Report, TargetReport


def find_missed(report: Report) -> MissedError | None:
    """Return the error in which a run ends that broke its floor or missed a target; None if it kept both."""
    if report.floor and report.floor.is_broken:
        return AccuracyError(report.floor.text or "", report=report)
    missed = [each for each in report.targets or [report.target] if not each.is_met]
    if not missed:
        return None
    asked = " and ".join(_describe_limit(each) for each in missed)
    left = " and ".join(numbers.cost(each.kind, each.reached) for each in missed)
    outcome = "nothing could be removed" if missed[0].kind == "drop" else f"{left} is left"
    return TargetError(
        f"target {asked} is not met, because layers had to stay whole: {outcome}; the files hold that model",
        report=report,
    )


def _describe_limit(target: TargetReport) -> str:
    if target.kind == "drop":
        return f"drop {numbers.asked(target.kind, target.asked)}"
    return f"{target.kind} ≤ {numbers.cost(target.kind, target.limit)}"

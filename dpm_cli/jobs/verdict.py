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
    if missed[0].kind == "drop":  # which stands alone
        asked, outcome = f"drop {numbers.asked('drop', missed[0].asked)}", "nothing could be removed"
    else:
        asked = " and ".join(f"{each.kind} ≤ {numbers.cost(each.kind, each.limit)}" for each in missed)
        outcome = " and ".join(numbers.cost(each.kind, each.reached) for each in missed) + " is left"
    return TargetError(
        f"target {asked} is not met, because layers had to stay whole: {outcome}; the files hold that model",
        report=report,
    )

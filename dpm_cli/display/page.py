"""Write report.html: one file that shows a run, opens without network, and follows the reader's light or dark theme."""

import functools
from importlib import resources
from pathlib import Path

from jinja2 import Environment

from dpm_cli.display.charts import draw_charts
from dpm_cli.display.facts import details, disappointments, doubts, rows, title
from dpm_cli.display.history import read_history
from dpm_cli.display.reports import read_report
from dpm_cli.files import METRICS, PAGE, read_regular_text, write_text_atomic
from dpm_cli.report import Report

LINE = 10_000  # letters: a page breaks lines by itself
ELSEWHERE = ("note",)  # details that have a place of their own


def write_page(folder: Path, report: Report | None = None) -> Path:
    """Write the page of a finished run beside its report, and return its path.

    report: that of the folder, if it was read already. Raises OutputError if there is none, RunError if the page cannot
    be written.
    """
    report = report or read_report(folder)
    history = read_history(folder / METRICS)
    recipe = folder / "recipe.yaml"
    page = _template().render(
        title=title(report),
        report=report,
        rows=rows(report),
        charts=draw_charts(report, history),
        mistakes=history.mistakes,
        notes=[*doubts(report), *disappointments(report), *report.notes],
        details=[(label, lines) for label, lines in details(report, LINE) if lines and label not in ELSEWHERE],
        recipe=read_regular_text(recipe, errors="replace") if recipe.is_file() else "",
        versions=report.versions,
    )
    write_text_atomic(folder / PAGE, page)
    return folder / PAGE


@functools.cache
def _template():  # type: ignore[no-untyped-def]
    text = (resources.files("dpm_cli.display") / "page.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)

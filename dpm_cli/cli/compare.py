"""`dpm compare`: show many finished runs in one table."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dpm_cli.cli.options import AsJson
from dpm_cli.cli.outcome import print_csv, print_json
from dpm_cli.errors import UsageError


def compare(
    reports: Annotated[list[Path], typer.Argument(metavar="REPORT...", help="report.json files, or their folders.")],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values, for a spreadsheet.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show many finished runs in one table.

    For example: dpm compare out/*/report.json
    """
    from dpm_cli.cli.compared import ComparedRun, summarise_all

    if as_csv and as_json:
        raise UsageError("--csv and --json contradict each other: give one of them")
    rows = summarise_all(reports)
    if as_json:
        print_json([asdict(row) for row in rows])
    elif as_csv:
        print_csv(ComparedRun, rows)
    else:
        from dpm_cli.cli.summaries import print_compared

        print_compared(rows)

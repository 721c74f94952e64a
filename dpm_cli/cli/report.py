"""`dpm report`: write the page of a finished run again."""

from pathlib import Path
from typing import Annotated

import typer

from dpm_cli.cli.progress import working


def report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a finished run.")] = Path("out"),
) -> None:
    """Write the report.html of a run again.

    It shows tables, charts and pictures in one file. Every run writes it once; this is for earlier runs.
    """
    from dpm_cli.display.page import write_page

    with working(f"drawing {folder}"):
        path = write_page(folder)
    print(path)

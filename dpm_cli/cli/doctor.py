"""`dpm doctor`: say what is in the folder of a run, and what can be resumed."""

from pathlib import Path
from typing import Annotated

import typer

from dpm_cli.cli.options import AsJson
from dpm_cli.cli.outcome import flush, print_error, print_json
from dpm_cli.cli.progress import working


def doctor(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a run, or one with trainings.")] = Path(
        "out"
    ),
    as_json: AsJson = False,
) -> None:
    """Say what is in a folder of results, and what can be resumed.

    It reads everything, compares checksums, and changes nothing. Exit code 2 if a run would be refused there, or if
    a result is damaged.
    """
    from dpm_cli.jobs.doctor import examine

    with working(f"examining {folder}"):
        found = examine(folder)
    if as_json:
        print_json(found.to_dict())
    else:
        from dpm_cli.cli.summaries import print_examined

        print_examined(found)
    flush()
    if found.problem is not None:
        print_error(found.problem)
        raise typer.Exit(2)

"""Read the report of a finished run, or say in plain words what is there instead."""

import json
from pathlib import Path

from dpm_cli.errors import OutputError
from dpm_cli.files import CHECKPOINT, REPORT, is_unfinished, read_regular_text
from dpm_cli.report import Report


def read_report(place: Path) -> Report:
    """Read the report.json at a place, or in the folder there. Raises OutputError if it is none."""
    path = place / REPORT if place.is_dir() else place
    try:
        return Report.from_json(read_regular_text(path))
    except FileNotFoundError:
        raise OutputError(_explain_absence(path)) from None
    except UnicodeDecodeError:
        reason: object = "not text"
    except json.JSONDecodeError:
        reason = "not one JSON document"
    except OSError as error:
        reason = error.strerror
    except ValueError as error:
        reason = error
    raise OutputError(f"{path} is not the report of a run ({reason}): give the folder of a finished run")


def _explain_absence(path: Path) -> str:
    folder = path.parent
    if path.name == REPORT and is_unfinished(folder / CHECKPOINT):
        return f"{folder} holds an unfinished run, which has no report yet: dpm prune --resume -o {folder} goes on"
    return f"{path} does not exist: give the folder of a finished run"

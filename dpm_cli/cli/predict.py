"""`dpm predict`: say what a deployed file sees in pictures."""

from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.cli.options import AsJson, OwnArch, Trust
from dpm_cli.cli.outcome import flush, print_error, print_json
from dpm_cli.cli.progress import working
from dpm_cli.errors import UnreadableError


def predict(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A slim.pt, model.ts, model.onnx or model.pt2.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures of any size.")],
    top: Annotated[int, typer.Option(metavar="N", help="How many classes to show, most probable first.")] = 3,
    arch: OwnArch = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Say what a file sees in pictures.

    The file alone is enough: it holds the names of the classes, and how a picture becomes its input.
    """
    unreadable: UnreadableError | None = None
    with working(f"opening {file}"):
        try:
            predicted = dpm_cli.predict(file, images, top=top, arch=arch, trust=trust)
        except UnreadableError as error:  # what the other pictures show is worth having
            predicted, unreadable = error.predicted, error
    if as_json:
        print_json([each.to_dict() for each in predicted])
    else:
        from dpm_cli.cli.summaries import print_predicted

        print_predicted([each for each in predicted if not each.error])
    if unreadable:
        flush()
        for each in predicted:
            if each.error:
                print_error(each.error)
        raise typer.Exit(unreadable.exit_code)

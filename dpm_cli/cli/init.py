"""`dpm init`: write a recipe for one's own images."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.cli.options import (
    Architecture,
    DataPlace,
    Overwrite,
    Weights,
)
from dpm_cli.cli.outcome import libraries_on_stderr
from dpm_cli.errors import UsageError


def init(
    data: DataPlace = None,
    arch: Architecture = None,
    weights: Weights = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The recipe to write.")] = Path(
        "mine.yaml"
    ),
    overwrite: Overwrite = False,
) -> None:
    """Look at images and write a recipe that runs on them.

    It finds the classes and the sizes of the images, and fits input, batch and epochs to them and to this machine.

    For example: dpm init --data photos --arch torchvision:resnet50 -o mine.yaml
    """
    if data is None:
        raise UsageError("which images? --data FOLDER, with a folder of images for each class; or a CSV file")
    with libraries_on_stderr():
        recipe = dpm_cli.init(data, arch=arch, weights=weights, output=output, overwrite=overwrite)
    model, file = recipe.model, shlex.quote(str(output))
    trust = " --trust" if recipe.code else ""
    print(f"{output}: {model.arch}, {model.classes} classes, input {'×'.join(map(str, model.input))}")
    print(f"Next:\n  dpm train -r {file} -o model.pt{trust}\n  dpm prune model.pt -r {file} -o out{trust}")
    if model.arch.startswith(("torchvision:", "timm:")):
        print(f"Or, from published weights:\n  dpm prune {model.arch} -r {file} -o out")

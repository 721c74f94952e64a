"""`dpm export`: write the files that deploy once more, from a slim.pt alone."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.cli.options import AsJson, Overrides, Overwrite, OwnArch, Trust, collect_overrides
from dpm_cli.cli.outcome import print_json
from dpm_cli.cli.progress import working


class Format(StrEnum):
    torchscript = "torchscript"
    onnx = "onnx"
    onnx_fp16 = "onnx-fp16"
    onnx_int8 = "onnx-int8"
    pt2 = "pt2"
    openvino = "openvino"
    executorch = "executorch"


USUAL = (Format.torchscript, Format.onnx)


def export(
    slim: Annotated[Path, typer.Argument(metavar="SLIM", help="The slim.pt of a run.")],
    format: Annotated[
        list[Format] | None,
        typer.Option(help="Repeat for several formats.", show_default="torchscript and onnx"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write into.")] = Path(),
    arch: OwnArch = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            help="Its data and quantize make onnx-int8.",
            show_default="the recipe in slim.pt",
        ),
    ] = None,
    overrides: Overrides = None,
    opset: Annotated[int, typer.Option(metavar="N", help="The opset of ONNX files.")] = 18,
    overwrite: Overwrite = False,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Export a slim.pt again, without its run.

    Every file is loaded again and compared with the slim model.
    """
    formats = list(dict.fromkeys(str(each) for each in format or USUAL))
    changes = collect_overrides(overrides)
    settings = dpm_cli.load_recipe(recipe, changes) if recipe is not None else None
    with working(f"exporting {slim}"):
        exported = dpm_cli.export_slim(
            slim,
            formats=formats,
            output=output,
            overwrite=overwrite,
            arch=arch,
            opset=opset,
            recipe=settings,
            overrides=changes,
            trust=trust,
        )
    if as_json:
        print_json({"slim": str(slim), "exports": [asdict(each) for each in exported]})
    else:
        from dpm_cli.cli.summaries import print_exported

        print_exported(exported)

"""`dpm evaluate`: measure accuracy, cost, size and latency of a file."""

from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.cli.options import AsJson, Device, Overrides, RecipeName, Trust, collect_overrides
from dpm_cli.cli.outcome import print_json
from dpm_cli.cli.progress import working


def evaluate(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A dense model, slim.pt, or an exported file (.ts .onnx .xml .pte .pt2)."),
    ],
    recipe: RecipeName,
    overrides: Overrides = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Also measure latency of batches of N images.")] = 1,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="torch, onnxruntime, openvino, executorch or tensorrt.",
            show_default="the usual one for the file",
        ),
    ] = None,
    device: Device = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure a dense or slim model, or an exported file.

    Test accuracy on the recipe's data, MACs, parameters, size and latency.
    """
    settings = dpm_cli.load_recipe(recipe, collect_overrides(overrides))
    with working(f"evaluating {file}"):
        result = dpm_cli.evaluate(file, settings, device=device, trust=trust, latency_batch=batch, runtime=runtime)
    if as_json:
        print_json(result.to_dict())
    else:
        from dpm_cli.cli.summaries import print_evaluated

        print_evaluated(result)

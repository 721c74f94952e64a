"""`dpm inspect`: show the plan without training."""

from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.cli.options import (
    AnyRecipeName,
    Architecture,
    AsJson,
    Batch,
    DataPlace,
    Device,
    Epochs,
    Macs,
    ModelFile,
    Overrides,
    Params,
    Trust,
    Weights,
    collect_overrides,
    read_settings,
)
from dpm_cli.cli.outcome import flush, print_error, print_json
from dpm_cli.cli.progress import working
from dpm_cli.errors import TargetError


def inspect(
    model: ModelFile = None,
    recipe: AnyRecipeName = None,
    arch: Architecture = None,
    data: DataPlace = None,
    macs: Macs = None,
    params: Params = None,
    weights: Weights = None,
    epochs: Epochs = None,
    batch: Batch = None,
    overrides: Overrides = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure how much accuracy each group is worth, on validation data.")
    ] = False,
    share: Annotated[float, typer.Option(metavar="FRACTION", help="Share of its units that each group loses.")] = 0.5,
    images: Annotated[int, typer.Option(metavar="N", help="Validation images for --sensitivity.")] = 1000,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the sensitivities there; implies --sensitivity.")
    ] = None,
    device: Device = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show the plan without training.

    Groups, units, what stays whole and why, which targets can be met, and the widths that this
    one would give. All that dpm prune checks is checked: data, schedule, exports, free disk. Exit
    code 3 if the recipe's target cannot be met.
    """
    from dpm_cli.cli.summaries import print_plan, refuse, sensitivities_as_csv
    from dpm_cli.files import require_apart, require_writable, write_text_atomic

    shortcuts = (arch, data, weights, macs, params, epochs, batch)
    settings = read_settings(recipe, collect_overrides(overrides), shortcuts, model)
    if csv_file is not None:
        require_writable(csv_file.parent)
        require_apart({"the model": model, "the recipe": settings.source}, {csv_file: b""}, csv_file.parent)
    wanted = share if sensitivity or csv_file is not None else None
    with working(f"analysing {model}"):
        plan = dpm_cli.inspect(model, settings, sensitivity=wanted, images=images, device=device, trust=trust)
    if csv_file is not None:
        assert plan.sensitivity is not None
        write_text_atomic(csv_file, sensitivities_as_csv(plan.sensitivity))
    if as_json:
        print_json(plan.to_dict())
    else:
        print_plan(plan)
    problems = [*([] if plan.target.is_achievable else [refuse(plan)]), *plan.problems]
    flush()
    for problem in problems:
        print_error(problem)
    if problems:
        raise typer.Exit(plan.exit_code if plan.target.is_achievable else TargetError.exit_code)

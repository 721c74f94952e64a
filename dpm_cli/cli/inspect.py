"""`dpm inspect`: show the plan without training."""

import csv
import io
import sys
from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.cli import numbers
from dpm_cli.cli.options import AsJson, Device, ModelFile, Overrides, RecipeName, TrustPickle, collect_overrides
from dpm_cli.cli.outcome import flush, libraries_on_stderr, print_json
from dpm_cli.errors import TargetError
from dpm_cli.files import require_writable, write_atomic
from dpm_cli.results import Inspected, Sensitivity

COLUMNS = "group layers units removed macs_saved accuracy accuracy_change loss loss_change".split()


def inspect(
    model: ModelFile,
    recipe: RecipeName,
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
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Show the plan without training.

    Groups, units, what stays whole and why, which targets can be met, and the widths that this
    one would give. Exit code 3 if the recipe's target cannot be met.
    """
    settings = dpm_cli.load_recipe(recipe, collect_overrides(overrides))
    if csv_file is not None:
        require_writable(csv_file.parent)
    wanted = share if sensitivity or csv_file is not None else None
    with libraries_on_stderr():
        plan = dpm_cli.inspect(
            model, settings, sensitivity=wanted, images=images, device=device, trust_pickle=trust_pickle
        )
    if csv_file is not None:
        assert plan.sensitivity is not None
        text = sensitivities_as_csv(plan.sensitivity)
        write_atomic(csv_file, lambda path: _write(path, text))
    if as_json:
        print_json(plan.to_dict())
    else:
        from dpm_cli.cli.summaries import print_plan

        print_plan(plan)
    if not plan.target.is_achievable:
        flush()
        print(f"error: {refuse(plan)}", file=sys.stderr)
        raise typer.Exit(TargetError.exit_code)


def refuse(plan: Inspected) -> str:
    """Say that the target cannot be met, what can, and which settings to change."""
    kind = plan.target.kind
    low, high = (numbers.cost(kind, costs[kind]) for costs in (plan.lowest, plan.dense))
    reach = f"from {low} to just below {high} can" if plan.groups else "no unit can be removed, for the reasons above"
    return (
        f"target {kind} {plan.target.asked:g} cannot be met: {reach}; "
        "change prune.target, prune.min_keep, prune.round_to or prune.keep"
    )


def sensitivities_as_csv(measured: Sensitivity) -> str:
    """Write one line per group; changes are relative to the whole model. Layers are separated by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for group in measured.groups:
        changes = {
            "accuracy_change": group.accuracy - measured.accuracy,
            "loss_change": group.loss - measured.loss,
            "layers": " ".join(group.layers),
        }
        writer.writerow(group.to_dict() | changes)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

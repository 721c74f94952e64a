"""`dpm inspect`: the plan without training."""

import csv
import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import dpm_cli
from dpm_cli.cli import numbers
from dpm_cli.cli.options import AsJson, Device, ModelFile, Overrides, RecipeName, TrustPickle, collect_overrides
from dpm_cli.cli.outcome import flush, libraries_on_stderr, print_json
from dpm_cli.errors import TargetError
from dpm_cli.files import require_writable, write_atomic

COLUMNS = "group layers units removed macs_saved accuracy accuracy_change loss loss_change".split()


def inspect(
    model: ModelFile,
    recipe: RecipeName,
    overrides: Overrides = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure what each group is worth, on validation data.")
    ] = False,
    share: Annotated[float, typer.Option(metavar="FRACTION", help="Of its units that each group alone loses.")] = 0.5,
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
        text = sensitivities_as_csv(plan["sensitivity"])
        write_atomic(csv_file, lambda path: _write(path, text))
    if as_json:
        print_json(plan)
    else:
        from dpm_cli.cli.summaries import print_plan

        print_plan(plan)
    target = plan["target"]
    if not target["achievable"]:
        kind = target["kind"]
        low, high = (numbers.cost(kind, each) for each in plan["achievable"][kind])
        reach = (
            f"from {low} to just below {high} can"
            if plan["groups"]
            else "no unit can be removed, for the reasons above"
        )
        flush()
        print(
            f"error: target {kind} {target['asked']:g} cannot be met: {reach}; "
            "change prune.target, prune.min_keep, prune.round_to or prune.keep",
            file=sys.stderr,
        )
        raise typer.Exit(TargetError.exit_code)


def sensitivities_as_csv(measured: dict[str, Any]) -> str:
    """One line per group; changes are against the model as it is. Layers are separated by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in measured["groups"]:
        changes = {f"{key}_change": row[key] - measured[key] for key in ("accuracy", "loss")}
        writer.writerow(row | changes | {"layers": " ".join(row["layers"])})
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

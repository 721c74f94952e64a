"""`dpm inspect`: the plan without training."""

import sys

import typer

import dpm_cli
from dpm_cli.cli import numbers
from dpm_cli.cli.options import AsJson, ModelFile, Overrides, RecipeName, TrustPickle, collect_overrides
from dpm_cli.cli.outcome import flush, libraries_on_stderr, print_json
from dpm_cli.errors import TargetError


def inspect(
    model: ModelFile,
    recipe: RecipeName,
    overrides: Overrides = None,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Show the plan without training.

    Groups, units, what stays whole and why, and which targets can be met. Exit code 3 if the
    recipe's target is not one of them.
    """
    settings = dpm_cli.load_recipe(recipe, collect_overrides(overrides))
    with libraries_on_stderr():
        plan = dpm_cli.inspect(model, settings, trust_pickle=trust_pickle)
    if as_json:
        print_json(plan)
    else:
        from dpm_cli.cli.summaries import print_plan

        print_plan(plan)
    target = plan["target"]
    if not target["achievable"]:
        kind = target["kind"]
        low, high = (numbers.cost(kind, each) for each in plan["achievable"][kind])
        flush()
        print(
            f"error: target {kind} {target['asked']:g} cannot be met: from {low} to just below {high} can; "
            "change prune.target, prune.min_keep, prune.round_to or prune.keep",
            file=sys.stderr,
        )
        raise typer.Exit(TargetError.exit_code)

"""`dpm train`: train the dense model of a recipe."""

from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.cli.options import (
    AsJson,
    Device,
    Overrides,
    Overwrite,
    Quiet,
    RecipeName,
    Seed,
    TrustPickle,
    collect_overrides,
)
from dpm_cli.cli.outcome import print_json
from dpm_cli.cli.progress import follow


def train(
    recipe: RecipeName,
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="Weights to start from, instead of from scratch."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The state dict to write.")] = Path(
        "model.pt"
    ),
    overrides: Overrides = None,
    device: Device = "auto",
    seed: Seed = None,
    overwrite: Overwrite = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train the dense model of a recipe.

    The recipe's `dense` section says how, or its `train` section if there is no `dense`.
    """
    settings = dpm_cli.load_recipe(recipe, collect_overrides(overrides, seed))
    with follow(quiet=quiet, as_json=as_json) as tell:
        result = dpm_cli.train(
            settings,
            output=output,
            model=model,
            device=device,
            overwrite=overwrite,
            trust_pickle=trust_pickle,
            on_event=tell,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        from dpm_cli.cli.summaries import print_trained

        print_trained(result)

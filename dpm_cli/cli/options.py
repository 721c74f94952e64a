"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="A state dict, .safetensors or slim.pt.")]


def complete_recipe(incomplete: str) -> list[str]:
    """List the shipped recipes that begin so, for the shell."""
    from dpm_cli.recipe import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        help="A YAML file, or a shipped recipe's name (see dpm recipes).",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe, such as prune.rounds=3. Repeat."),
]
OutputFolder = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write all results into.")
]
Device = Annotated[str, typer.Option(help="auto (CUDA if there is a GPU, otherwise the CPU), cpu, cuda or cuda:1.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="The seed, in place of the recipe's.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
NoLock = Annotated[
    bool,
    typer.Option("--no-lock", help="Do not lock the output, where the file system cannot. Start one run at a time!"),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Allow files that can run code: pickled modules, .pt2, foreign TorchScript, recipes that name code.",
    ),
]
OwnArch = Annotated[
    str | None,
    typer.Option("--arch", metavar="ARCH", help="package.module:function of your own code, if a slim.pt needs it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result.")]


def collect_overrides(overrides: list[str] | None, seed: int | None = None) -> list[str]:
    """Combine `--set` and `--seed` into overrides of a recipe; `--seed` wins."""
    return [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]

"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="A state dict, .safetensors or slim.pt.")]
RecipeName = Annotated[
    str,
    typer.Option("--recipe", "-r", metavar="RECIPE", help="A YAML file, or a shipped recipe's name (see dpm recipes)."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe, such as prune.rounds=3. Repeat."),
]
OutputFolder = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="The folder for everything that is made.")
]
Device = Annotated[str, typer.Option(help="auto (CUDA if there, else the CPU), cpu, cuda or cuda:1.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Replaces the recipe's seed.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")]
TrustPickle = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Load a file that runs code: a pickled module, a .pt2. Only your own files!"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]


def collect_overrides(overrides: list[str] | None, seed: int | None = None) -> list[str]:
    """`--set` and `--seed` as overrides of a recipe; the latter wins."""
    return [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]

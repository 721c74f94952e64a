"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.files import checkpoint_of, require_resumable

ModelFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL",
        help="A state dict, .safetensors or slim.pt; or torchvision:NAME, timm:NAME for published weights.",
        show_default=False,
    ),
]


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
AnyRecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        help="A YAML file, or a shipped recipe's name (see dpm recipes). Without one, --data and --arch make it.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
Architecture = Annotated[
    str | None,
    typer.Option(
        "--arch", metavar="ARCH", help="A built-in name, torchvision:NAME, timm:NAME or package.module:function."
    ),
]
DataPlace = Annotated[
    str | None,
    typer.Option("--data", metavar="DATA", help="A folder of images in folders per class, a CSV, or a dataset's name."),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="W", help="Start from torchvision:DEFAULT, timm:DEFAULT or a file."),
]
Macs = Annotated[
    str | None, typer.Option("--macs", metavar="TARGET", help="Multiply-accumulates to keep, such as 0.5 or 60M.")
]
Params = Annotated[str | None, typer.Option("--params", metavar="TARGET", help="Parameters to keep, as 0.5 or 2M.")]
Epochs = Annotated[int | None, typer.Option("--epochs", metavar="N", help="Epochs of every stage of training.")]
Batch = Annotated[int | None, typer.Option("--batch", metavar="N", help="Images per step.")]
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
        help="Allow files that can run code: pickled modules, .pt2, foreign TorchScript, recipes that name code. "
        "Code that a slim.pt names needs --arch, or such a recipe.",
    ),
]
OwnArch = Annotated[
    str | None,
    typer.Option("--arch", metavar="ARCH", help="package.module:function of your own code, if a slim.pt needs it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result.")]

Given = tuple[str | None, str | None, str | None, str | None, str | None, int | None, int | None]  # as in `Shortcuts`


def collect_overrides(overrides: list[str] | None, seed: int | None = None) -> list[str]:
    """Combine `--set` and `--seed` into overrides of a recipe; `--seed` wins."""
    return [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]


def _has_changes(overrides: list[str], shortcuts: Given) -> bool:
    return bool(overrides) or any(each is not None for each in shortcuts)


def read_training_settings(
    recipe: str | None, overrides: list[str], shortcuts: Given, model: Path | None, resumed: Path | None
) -> "dpm_cli.Recipe":
    """Read the settings of `dpm train`. resumed: the model whose checkpoint tells them if none are given."""
    if resumed is not None and recipe is None and not _has_changes(overrides, shortcuts):
        from dpm_cli.run.resume import read_begun

        if begun := read_begun(checkpoint_of(resumed)):
            return begun
        require_resumable(resumed)
    return read_settings(recipe, overrides, shortcuts, model)


def _resume_settings(
    recipe: str | None, overrides: list[str], shortcuts: Given, folder: Path
) -> "dpm_cli.Recipe | None":
    """Read the settings that a run in this folder began with, if none are given again.

    A recipe alone is changed as it was then. Returns None if the folder holds no run, or if settings are given. What
    was typed then is no consent now: the folder may come from anyone.
    """
    from dpm_cli.recipe.reader import read_recipe, read_recipe_text
    from dpm_cli.run.resolved import NAME, read_changes

    if _has_changes(overrides, shortcuts) or not (folder / NAME).is_file():
        return None
    if recipe is None:
        return read_recipe(read_recipe_text(folder / NAME), name=str(folder / NAME))
    changed = dpm_cli.load_recipe(recipe, read_changes(folder))
    changed._typed = frozenset()
    return changed


def read_settings(
    recipe: str | None,
    overrides: list[str],
    shortcuts: Given,
    model: Path | None,
    resumed: Path | None = None,
) -> "dpm_cli.Recipe":
    """Read a recipe, or make one from options. shortcuts: as `Shortcuts` takes them. resumed: the folder of a run.

    A recipe alone is checked without importing torch.
    """
    if resumed is not None and (earlier := _resume_settings(recipe, overrides, shortcuts, resumed)):
        return earlier
    if recipe is not None and all(each is None for each in shortcuts) and ":" not in str(model):
        return dpm_cli.load_recipe(recipe, overrides)
    from dpm_cli.jobs.shortcuts import Shortcuts, settle

    return settle(recipe, overrides, Shortcuts(*shortcuts), model=model)

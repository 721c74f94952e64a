"""`dpm prune`: the main job."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

from torch import nn

from dpm_cli.engine.checkpoint import remove_checkpoints
from dpm_cli.engine.device import choose_device
from dpm_cli.engine.distributed import join
from dpm_cli.engine.faults import explaining_faults
from dpm_cli.engine.precision import choose_precision
from dpm_cli.errors import (
    AccuracyError,
    OutputError,
)
from dpm_cli.files import REPORT, is_unfinished, locked, prepare_output, require_writable
from dpm_cli.jobs.loading import AnyRecipe, OnEvent, load_module, load_splits, resolve_recipe
from dpm_cli.measure import flushing_denormals
from dpm_cli.recipe import Recipe, hash_recipe
from dpm_cli.report import Report
from dpm_cli.run.story import Run


@flushing_denormals()  # decaying weights pass through denormals, which CPUs compute slowly
def prune(
    model: nn.Module | str | Path,
    recipe: AnyRecipe,
    *,
    output: str | Path = "out",
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust_pickle: bool = False,
    on_event: OnEvent = None,
    should_stop: Callable[[], int] | None = None,
) -> Report:
    """Prune a trained model to the recipe's target; write slim.pt, the exports and the report into `output`.

    model: a file, or a module of the recipe's architecture (any module, if its code can be given again to `load`).
    should_stop: asked after every step; when true, or the exit code to stop with, the run writes a checkpoint and
    raises Interrupted. Started by a launcher such as torchrun, all of its processes do this together; each calls
    `on_event` and returns the report, the first one alone writes.
    Raises a DpmError whose message is one line and whose `exit_code` is the command line's; an AccuracyError comes
    after everything was written, and brings the report.
    """
    with join(device) as world, contextlib.ExitStack() as stack:
        recipe, folder = resolve_recipe(recipe), Path(output)
        if world.share(resume and (folder / REPORT).exists() and not is_unfinished(folder)):
            return cast(Report, world.share(_earlier_report(folder, recipe) if world.is_main else None))
        torch_device = choose_device(device)
        precision = choose_precision(recipe.precision, torch_device)
        module, arch = load_module(model, recipe, trust_pickle)
        # A run cannot go on with another batch.
        stack.enter_context(explaining_faults(recipe.data.batch, " --overwrite"))
        if world.is_main:
            require_writable(folder)
            stack.enter_context(locked(folder))
            prepare_output(folder, overwrite=overwrite, resume=resume)
        with world.main_first():
            splits = load_splits(recipe, torch_device)
        run = Run(
            module,
            recipe,
            splits,
            arch=arch,
            output=folder,
            device=torch_device,
            precision=precision,
            should_stop=should_stop or (lambda: False),
            world=world,
        )
        if overwrite and world.is_main:
            remove_checkpoints(folder)  # or a later --resume would go on with the run that was given up
        if arch is None:
            run.notes.append(
                f"the model is not what model.arch ({recipe.model.arch}) builds: load slim.pt again with "
                "dpm_cli.load(path, model=...) and a freshly built dense module"
            )
        if world.size > 1:
            run.notes.append(f"trained by {world.size} processes")
        for event in run.events(resume=resume):
            if on_event:
                on_event(event)
    return run.report


def _earlier_report(folder: Path, recipe: Recipe) -> Report:
    try:
        report = Report.from_json((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder / 'report.json'} is not a report: {error}; start anew with --overwrite") from None
    if report.recipe_hash != hash_recipe(recipe):
        raise OutputError(f"{folder} holds a finished run of another recipe: choose another folder, or --overwrite")
    if report.floor and report.floor.is_broken:
        raise AccuracyError(report.floor.text or "", report=report)
    return report

"""`dpm prune`: prune a trained model to the target of a recipe."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.cli.interrupts import explaining_hard_stops, stop_between_steps
from dpm_cli.cli.options import (
    AsJson,
    Device,
    ModelFile,
    NoLock,
    OutputFolder,
    Overrides,
    Overwrite,
    Quiet,
    RecipeName,
    Seed,
    Trust,
    collect_overrides,
)
from dpm_cli.cli.outcome import flush, print_json
from dpm_cli.cli.processes import speaking
from dpm_cli.cli.progress import follow
from dpm_cli.errors import AccuracyError
from dpm_cli.files import CHECKPOINT


def prune(
    model: ModelFile,
    recipe: RecipeName,
    output: OutputFolder = Path("out"),
    overrides: Overrides = None,
    device: Device = "auto",
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished run of the output folder.")] = False,
    overwrite: Overwrite = False,
    trust: Trust = False,
    no_lock: NoLock = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prune MODEL to the target of a recipe.

    Writes slim.pt, the exported files and report.json into the output folder.

    Ctrl-C saves a checkpoint and stops; the same command with --resume goes on. On several GPUs: torchrun
    --nproc-per-node=K -m dpm_cli prune ...
    """
    broken: AccuracyError | None = None
    with speaking(device) as is_speaker:
        settings = dpm_cli.load_recipe(recipe, collect_overrides(overrides, seed))
        with (
            follow(quiet=quiet or not is_speaker, as_json=as_json) as tell,
            stop_between_steps() as stop,
            explaining_hard_stops(stop, output / CHECKPOINT),
        ):
            try:
                report = dpm_cli.prune(
                    model,
                    settings,
                    output=output,
                    device=device,
                    resume=resume,
                    overwrite=overwrite,
                    trust=trust,
                    lock=not no_lock,
                    on_event=stop.listening(tell),
                    should_stop=lambda: stop.is_wanted() and stop.exit_code,
                )
            except AccuracyError as error:
                report, broken = error.report, error
        if is_speaker:
            show(report, as_json=as_json)
        if broken:  # the run has written everything, and its report is shown as usual
            flush()
            if is_speaker:
                print(f"error: {broken}", file=sys.stderr)
            raise typer.Exit(broken.exit_code)


def show(report: "dpm_cli.Report", *, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        from dpm_cli.cli.tables import print_report

        print_report(report)

"""`dpm prune`: prune a trained model to the target of a recipe."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import dpm_cli
from dpm_cli.cli.interrupts import explaining_hard_stops, stop_between_steps
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
    NoLock,
    OutputFolder,
    Overrides,
    Overwrite,
    Params,
    Quiet,
    Seed,
    Trust,
    Weights,
    collect_overrides,
    read_settings,
)
from dpm_cli.cli.outcome import flush, print_json
from dpm_cli.cli.processes import speaking
from dpm_cli.cli.progress import follow
from dpm_cli.errors import MissedError
from dpm_cli.files import CHECKPOINT


def prune(
    model: ModelFile = None,
    recipe: AnyRecipeName = None,
    output: OutputFolder = Path("out"),
    arch: Architecture = None,
    data: DataPlace = None,
    macs: Macs = None,
    params: Params = None,
    weights: Weights = None,
    epochs: Epochs = None,
    batch: Batch = None,
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
    """Prune MODEL to a target.

    Settings come from a recipe, from options, or both: dpm prune model.pt --arch torchvision:resnet18 --data photos
    --macs 0.5 -o out. Writes slim.pt, the exported files, report.json and the whole recipe into the output folder.

    Ctrl-C saves a checkpoint and stops; the same command with --resume goes on. On several GPUs: torchrun
    --nproc-per-node=K -m dpm_cli prune ...
    """
    missed: MissedError | None = None
    with speaking(device) as is_speaker:
        shortcuts = (arch, data, weights, macs, params, epochs, batch)
        resumed = output if resume else None
        settings = read_settings(recipe, collect_overrides(overrides, seed), shortcuts, model, resumed)
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
            except MissedError as error:
                if error.report is None:
                    raise
                report, missed = error.report, error
        if is_speaker:
            show(report, as_json=as_json)
        if missed:  # the run has written everything, and its report is shown as usual
            _end(missed, is_speaker)


def _end(missed: MissedError, is_speaker: bool) -> NoReturn:
    flush()
    if is_speaker:
        print(f"error: {missed}", file=sys.stderr)
    raise typer.Exit(missed.exit_code)


def show(report: "dpm_cli.Report", *, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        from dpm_cli.cli.tables import print_report

        print_report(report)

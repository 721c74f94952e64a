"""`dpm prune`: prune a trained model to the target of a recipe."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.cli.interrupts import Stop, stop_between_steps
from dpm_cli.cli.options import (
    AsJson,
    Device,
    ModelFile,
    OutputFolder,
    Overrides,
    Overwrite,
    Quiet,
    RecipeName,
    Seed,
    TrustPickle,
    collect_overrides,
)
from dpm_cli.cli.outcome import flush, print_json
from dpm_cli.cli.processes import speaking
from dpm_cli.cli.progress import follow
from dpm_cli.errors import AccuracyError, Interrupted


def prune(
    model: ModelFile,
    recipe: RecipeName,
    output: OutputFolder = Path("out"),
    overrides: Overrides = None,
    device: Device = "auto",
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished run of the output folder.")] = False,
    overwrite: Overwrite = False,
    trust_pickle: TrustPickle = False,
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
            _explaining_hard_stops(stop, output),
        ):
            try:
                report = dpm_cli.prune(
                    model,
                    settings,
                    output=output,
                    device=device,
                    resume=resume,
                    overwrite=overwrite,
                    trust_pickle=trust_pickle,
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


@contextlib.contextmanager
def _explaining_hard_stops(stop: Stop, output: Path) -> Iterator[None]:
    """Turn an interrupt that stopped the run at once into an Interrupted that says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, RuntimeError) as error:
        # Ctrl-C on a terminal also reaches the processes that decode images.
        is_dead_worker = stop.is_wanted() and "DataLoader worker" in str(error)
        if isinstance(error, RuntimeError) and not is_dead_worker:
            raise
        is_resumable = (output / "checkpoint.pt").exists()
        way_out = "continue from its last checkpoint with --resume" if is_resumable else "nothing was saved yet"
        raise Interrupted(f"stopped at once; {way_out}", stop.exit_code) from None

"""`dpm train`: train the dense model of a recipe."""

from pathlib import Path
from typing import Annotated

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
    NoLock,
    Overrides,
    Overwrite,
    Quiet,
    Seed,
    Trust,
    Weights,
    collect_overrides,
    read_training_settings,
)
from dpm_cli.cli.outcome import print_json
from dpm_cli.cli.processes import speaking
from dpm_cli.cli.progress import follow
from dpm_cli.files import checkpoint_of


def train(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="Weights to start from, instead of from scratch."),
    ] = None,
    recipe: AnyRecipeName = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The state dict to write.")] = Path(
        "model.pt"
    ),
    arch: Architecture = None,
    data: DataPlace = None,
    weights: Weights = None,
    epochs: Epochs = None,
    batch: Batch = None,
    overrides: Overrides = None,
    device: Device = "auto",
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished training of FILE.")] = False,
    overwrite: Overwrite = False,
    trust: Trust = False,
    no_lock: NoLock = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train the dense model of a recipe.

    The recipe's `dense` section says how; without one, its `train` section.

    Ctrl-C saves a checkpoint beside FILE and stops; dpm train -o FILE --resume goes on. On several GPUs: torchrun
    --nproc-per-node=K -m dpm_cli train ...
    """
    with speaking(device) as is_speaker:
        shortcuts = (arch, data, weights, None, None, epochs, batch)
        resumed = output if resume else None
        settings = read_training_settings(recipe, collect_overrides(overrides, seed), shortcuts, model, resumed)
        with (
            follow(quiet=quiet or not is_speaker, as_json=as_json) as tell,
            stop_between_steps() as stop,
            explaining_hard_stops(stop, checkpoint_of(output)),
        ):
            result = dpm_cli.train(
                settings,
                output=output,
                model=model,
                device=device,
                resume=resume,
                overwrite=overwrite,
                trust=trust,
                lock=not no_lock,
                on_event=stop.listening(tell),
                should_stop=lambda: stop.is_wanted() and stop.exit_code,
            )
    if not is_speaker:
        return
    if as_json:
        print_json(result.to_dict())
    else:
        from dpm_cli.cli.summaries import print_trained

        print_trained(result)

"""The command `dpm`. Each command has its own file; this one turns errors into a line and an exit code."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from dpm_cli.cli import (
    benchmark,
    compare,
    demo,
    doctor,
    evaluate,
    export,
    init,
    inspect,
    predict,
    prune,
    recipes,
    report,
    schema,
    train,
)
from dpm_cli.cli.interrupts import catching_interrupts, was_interrupted
from dpm_cli.cli.outcome import fail, flush, open_closed_streams, silence_closed_pipe
from dpm_cli.cli.signs import make_output_safe
from dpm_cli.errors import DpmError, UsageError

# Plain help: rich would triple the time it takes, and would draw boxes into pipes.
app = typer.Typer(
    name="dpm",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMPLETE = "_DPM_COMPLETE"  # set by the completion that `dpm --install-completion` puts into the shell

for command in (
    demo.demo,
    init.init,
    train.train,
    prune.prune,
    inspect.inspect,
    evaluate.evaluate,
    export.export,
    predict.predict,
    benchmark.benchmark,
    compare.compare,
    report.report,
    doctor.doctor,
    recipes.recipes,
    schema.schema,
):
    app.command(no_args_is_help=False)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"dpm {version('dpm-cli')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def describe(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Make a trained PyTorch vision model smaller and faster, and export it.

    Start with `dpm demo`. Exit codes: 0 done; 1 the run failed; 2 bad arguments, recipe or model file; 3 the target
    cannot be or was not met; 4 an accuracy floor was broken; 130 interrupted (resumable).
    """
    if context.invoked_subcommand is None:
        print(context.get_help())
    elif not _has_current_folder():
        raise UsageError("the current folder has been removed: change into another")


def _has_current_folder() -> bool:
    """Tell whether there is one; a library of torch's would end this process without."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dpm` and return its exit code. An error becomes one line on stderr, and with --json also a document."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    open_closed_streams()
    make_output_safe()
    if not os.environ.get("DPM_DEBUG"):
        warnings.simplefilter("ignore")  # libraries warn about their own internals
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of folders that it cannot write
    if COMPLETE in os.environ:  # the shell asks what may follow
        app(prog_name="dpm")
    with catching_interrupts():
        try:
            return _run(given)
        except BrokenPipeError:
            return silence_closed_pipe()
        except SystemExit as ended:  # rich exits by itself when a pipe is closed
            if isinstance(ended.__context__, BrokenPipeError):
                return silence_closed_pipe()
            raise
        except (Exception, KeyboardInterrupt) as error:
            if was_interrupted() and not isinstance(error, DpmError):
                error = KeyboardInterrupt()  # half-imported modules raise errors of all kinds
            try:
                return fail(error, as_json="--json" in given)
            except BrokenPipeError:
                return silence_closed_pipe()


def _run(given: list[str]) -> int:
    """Run the command; return its exit code if it ends well."""
    try:
        command = typer.main.get_command(app)
        with command.make_context("dpm", given) as context:
            command.invoke(context)
        code = 0
    except typer.Exit as stop:
        code = stop.exit_code
    flush()
    return code

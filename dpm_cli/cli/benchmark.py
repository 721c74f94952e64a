"""`dpm benchmark`: measure the latency of many files, in turns."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import dpm_cli
from dpm_cli.cli.options import AsJson, OwnArch, Trust
from dpm_cli.cli.outcome import print_csv, print_json
from dpm_cli.cli.progress import working
from dpm_cli.errors import UsageError


def benchmark(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Exported files, slim.pt, or dense weights (with --recipe).")
    ],
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="torch, onnxruntime, openvino, executorch or tensorrt. Repeat.",
            show_default="the usual one of each file",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Images per call. Repeat.", show_default="1")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Threads. Repeat.", show_default="as many as torch takes")
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", help="Seconds for each measurement.")] = 1.0,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", metavar="RECIPE", help="Says what dense weights belong to.")
    ] = None,
    arch: OwnArch = None,
    trust: Trust = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values, for a spreadsheet.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of many files on the CPU, in turns.

    In turns means that a busy moment of the machine hits all of them. The first file is what the others are compared
    with, at the same batch size and threads: of one thread by processor time, which others do not slow down.
    """
    if as_csv and as_json:
        raise UsageError("--csv and --json contradict each other: give one of them")
    with working(f"measuring {len(files)} files"):
        rows = dpm_cli.benchmark(
            files,
            runtimes=runtime or (),
            batches=batch or (1,),
            threads=threads or (),
            seconds=seconds,
            recipe=recipe,
            arch=arch,
            trust=trust,
        )
    if as_json:
        print_json([asdict(row) for row in rows])
    elif as_csv:
        from dpm_cli.results import Benchmarked

        print_csv(Benchmarked, rows)
    else:
        from dpm_cli.cli.summaries import print_benchmarked

        print_benchmarked(rows)

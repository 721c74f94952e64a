"""Print the result of a run: a table, and details below it."""

import os
import re
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from dpm_cli.display import numbers
from dpm_cli.display.facts import RUNTIMES, details, rows, title, wrap_words
from dpm_cli.report import Milliseconds, Report, SparsityReport

LABEL = 10  # columns


def print_report(report: Report) -> None:
    console = make_console()
    print_folded(console, title(report), style="bold")
    table = make_table("", "dense", "slim", "change", title=None)
    for row in rows(report):
        table.add_row(*row)
    console.print(table)
    if any(made.runtime for made in report.exports):
        console.print(_file_table(report))
    if report.sparsities:
        console.print(_sparsity_table(report.sparsities))
    for label, lines in details(report, console.width - LABEL):
        print_detail(console, label, lines)


def _file_table(report: Report) -> Table:
    """Compare the files that deploy with the dense model in ONNX Runtime."""
    dense, slim = report.dense, report.slim
    table = make_table("file", "runtime", "size", "", "test accuracy", "latency", "", title=None)

    def add(name: str, runtime: str, size: int, accuracy: float | None, took: Milliseconds | None) -> None:
        before = dense.latency.get("onnxruntime")
        is_dense = name == "dense"
        table.add_row(
            name,
            RUNTIMES.get(runtime, runtime),
            numbers.size(size),
            "" if is_dense or not dense.onnx_bytes else f"{dense.onnx_bytes / size:.1f}× smaller",
            numbers.percent(accuracy),
            numbers.milliseconds(took.median) if took else numbers.NOTHING,
            "" if is_dense or not took or not before else numbers.speed_change(before.median, took.median),
        )

    if dense.onnx_bytes:
        add("dense", "onnxruntime", dense.onnx_bytes, dense.accuracy, dense.latency.get("onnxruntime"))
    for made in report.exports:
        name = made.path.rpartition("/")[2]
        if made.format == "onnx":
            add(name, "onnxruntime", made.bytes, slim.accuracy, slim.latency.get("onnxruntime"))
        elif made.runtime is not None:
            add(name, made.runtime, made.bytes, made.accuracy, made.latency)
    return table


def _sparsity_table(sparsities: Sequence[SparsityReport]) -> Table:
    """Show what the trained model loses by the cut alone, and what is won back."""
    table = make_table("sparsity", "weights", "trained", "cut", "recovered", "recalibrated", title=None)
    for each in sparsities:
        accuracies = (each.dense, each.cut, each.recovered, each.recalibrated)
        table.add_row(
            f"{each.reached:.3g}", numbers.size(each.bytes), *(numbers.percent(value) for value in accuracies)
        )
    return table


def make_console() -> Console:
    """Make a console that has 80 columns in a pipe, unless COLUMNS asks for more."""
    wanted = os.environ.get("COLUMNS", "")
    width = None if sys.stdout.isatty() else max(80, int(wanted) if wanted.isdecimal() else 0)
    return Console(width=width, highlight=False, markup=False, emoji=False)


def make_table(*columns: str, title: str | None) -> Table:
    """Make an empty table: text in the first column, numbers in the others; nothing is ever cut off."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    return table


def measure_width(console: Console, table: Table) -> int:
    """Count the columns that a table takes if nothing limits them."""
    return console.measure(table, options=console.options.update(width=1000)).maximum


def print_table(console: Console, table: Table) -> None:
    """Print a table, in a pipe as wide as it is: nothing forces lines there to be short, and names can be long."""
    if not console.is_terminal:
        console.width = max(console.width, measure_width(console, table))
    console.print(table)


def fold_path(path: str, width: int) -> str:
    """Break a path after its separators, into lines that are no longer than this if its parts are not."""
    lines = [""]
    for part in re.findall(r"[^/\\]*[/\\]*", path):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def print_folded(console: Console, text: str, *, label: str = "", style: str = "") -> None:
    """Print a line: in a pipe whole, on a terminal broken between words, with the label only before the first part."""
    lines = wrap_words(text, console.width - len(label)) if console.is_terminal else [text]
    for number, line in enumerate(lines):
        console.print(f"{' ' * len(label) if number else label}{line}", style=style, soft_wrap=True)


def print_detail(console: Console, label: str, lines: Sequence[str]) -> None:
    """Print the label once with the lines beside it. Long paths are not broken, so that they can be copied."""
    for number, line in enumerate(lines):
        console.print(f"{'' if number else label:<{LABEL}}{line}", soft_wrap=True)

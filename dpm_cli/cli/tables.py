"""Print the result of a run: a table, and details below it."""

import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from dpm_cli.cli import numbers
from dpm_cli.errors import listing
from dpm_cli.report import ExportedFile, KeptLayer, Milliseconds, Report, SparsityReport, Width

RUNTIMES = {"torch": "torch", "onnxruntime": "ONNX Runtime", "torchscript": "TorchScript"}
KINDS = {"macs": "MACs", "params": "parameters", "channels": "units"}
MOST_LAYERS = 60  # longer lists of layers are cut
LABEL = 10  # columns
DISAPPOINTING = 0.5  # gains in speed below this share of the gain in MACs get a note


def print_report(report: Report) -> None:
    console = make_console()
    console.print(title(report), style="bold", soft_wrap=True)
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


def title(report: Report) -> str:
    target = report.target
    asked = f"{target.asked:g}" if target.asked < 1 else numbers.cost(target.kind, target.asked)
    share = f"{100 * target.reached / target.dense:.1f} %" if target.dense else numbers.NOTHING
    reached, limit = (numbers.cost(target.kind, cost) for cost in (target.reached, target.limit))
    name = report.arch or "model"
    if report.sparsities:
        return f"{name}, {report.base}, target sparsity {asked}: {share} of the weights left ({reached})"
    return f"{name}, {report.method}, target {target.kind} {asked}: {share} left ({reached} of at most {limit})"


def rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Return rows of label, dense, slim and change."""
    dense, slim = report.dense, report.slim
    table = [
        ("MACs", numbers.count(dense.macs), numbers.count(slim.macs), numbers.cost_change(dense.macs, slim.macs)),
        (
            "parameters",
            numbers.count(dense.params),
            numbers.count(slim.params),
            numbers.cost_change(dense.params, slim.params),
        ),
        ("weights", numbers.size(dense.bytes), numbers.size(slim.bytes), numbers.cost_change(dense.bytes, slim.bytes)),
    ]
    if dense.accuracy is not None or slim.accuracy is not None:
        change = numbers.points_change(dense.accuracy, slim.accuracy)
        table.insert(2, ("test accuracy", numbers.percent(dense.accuracy), numbers.percent(slim.accuracy), change))
    for runtime, latency in dense.latency.items():
        before, after = latency.median, slim.latency.get(runtime)
        if after is not None:
            table.append(
                (
                    f"latency, {RUNTIMES.get(runtime, runtime)}",
                    numbers.milliseconds(before),
                    numbers.milliseconds(after.median),
                    numbers.speed_change(before, after.median),
                )
            )
    return table


def details(report: Report, width: int) -> Iterable[tuple[str, Sequence[str]]]:
    """Yield label and lines of each detail below the table. width: columns for the lines."""
    units = report.units
    if not report.sparsities:
        counts = f"{units.chosen} chosen, {units.released} released, {units.removed} removed"
        yield "units", [f"{units.total} in all: {counts}"]
        yield "widths", describe_widths(report.widths, width)
        agreement = numbers.agreement(report.compact_difference)
        yield "checked", [f"outputs before and after removing units agree {agreement}"]
    yield "kept", describe_kept(report.kept, width)
    yield "latency", [f"median over single images, warm, {_threads(report)}in turns"] if report.dense.latency else []
    more = [each.file for each in report.sparsities[1:]]
    yield "files", [*(path for name, path in report.files.items() if name in ("slim", "report")), *more]
    yield "exports", [describe_export(made) for made in report.exports]
    seconds = [f"{name} {numbers.duration(spent)}" for name, spent in report.seconds.items()]
    yield "time", wrap([*seconds, f"on {report.device} in {report.precision}", f"seed {report.seed}"], width)
    for note in [*doubts(report), *disappointments(report), *report.notes]:
        yield "note", wrap_words(note, width)


def _sparsity_table(sparsities: Sequence[SparsityReport]) -> Table:
    """Show what the trained model loses by the cut alone, and what is won back."""
    table = make_table("sparsity", "weights", "trained", "cut", "recovered", "recalibrated", title=None)
    for each in sparsities:
        accuracies = (each.dense, each.cut, each.recovered, each.recalibrated)
        table.add_row(
            f"{each.reached:.3g}", numbers.size(each.bytes), *(numbers.percent(value) for value in accuracies)
        )
    return table


def describe_widths(widths: Sequence[Width], width: int) -> list[str]:
    """List the output channels, before → after, of every layer that changed."""
    changed = [f"{each.layer} {each.before}→{each.after}" for each in widths if each.before != each.after]
    unchanged = len(widths) - len(changed)
    more = [f"{len(changed) - MOST_LAYERS} more in report.json"] if len(changed) > MOST_LAYERS else []
    same = [f"{unchanged} unchanged"] if unchanged else []
    return wrap([*changed[:MOST_LAYERS], *more, *same], width)


def describe_kept(kept: Sequence[KeptLayer], width: int) -> list[str]:
    """List the layers whose outputs stayed whole, gathered by reason."""
    lines: list[str] = []
    by_reason = sorted(kept, key=lambda each: each.reason)
    for reason, group in groupby(by_reason, key=lambda each: each.reason):
        layers = listing([each.layer for each in group])
        lines += wrap_words(f"{layers}: {reason}", width)
    return lines


def describe_export(made: ExportedFile) -> str:
    size = f"{made.path}  {numbers.size(made.bytes)}"
    if made.agreement is None:
        return f"{size}, agrees with the slim model {numbers.agreement(made.max_difference)}"
    kept = f", {listing(made.kept)} in fp32" if made.kept else ""
    same = f"{made.agreement:.1f} % of validation answers as the slim model's"
    return f"{size}, {same}, {made.drop or 0.0:.2f} points lost{kept}"


def _threads(report: Report) -> str:
    counts = {latency.threads for latency in report.dense.latency.values()} - {None}
    return "".join(f"{count} thread{'s' if count != 1 else ''}, " for count in counts)


def doubts(report: Report) -> list[str]:
    """Return a sentence for every latency that may be wrong."""
    return [
        describe_doubt(f"latency of the {name} model, {RUNTIMES.get(runtime, runtime)},", latency.doubt)
        for name, network in (("dense", report.dense), ("slim", report.slim))
        for runtime, latency in network.latency.items()
        if latency.doubt
    ]


def describe_doubt(what: str, why: str) -> str:
    return f"the {what} may be wrong: {why}; measure again while nothing else runs: dpm evaluate"


def disappointments(report: Report) -> list[str]:
    """Return a sentence if the model did not become as fast as its MACs promise."""
    if not report.slim.macs or report.slim.macs == report.dense.macs:
        return []
    promised = report.dense.macs / report.slim.macs
    slow = []
    for runtime, latency in report.dense.latency.items():
        after = report.slim.latency.get(runtime)
        if after is not None and after.median > 0:
            gained = latency.median / after.median
            if gained - 1 < DISAPPOINTING * (promised - 1):
                slow.append(f"{RUNTIMES.get(runtime, runtime)} {gained:.2f}×")
    if not slow:
        return []
    odd = {width.layer: width.after for width in report.widths if width.after % 8 and width.after < width.before}
    why = (
        f"{describe_odd_widths(odd)} Runtimes are slow at such widths: prune.round_to: 8 avoids them."
        if odd
        else "Single images through small layers wait for overhead and memory, not for arithmetic; a larger "
        "prune.round_to or larger batches can help."
    )
    return [f"faster by less than the {promised:.2f}× of the MACs: {', '.join(slow)}. {why}"]


def describe_odd_widths(widths: Mapping[str, int]) -> str:
    """Name layers (name -> width) whose widths are not multiples of 8."""
    layers = listing([f"{layer} ({width})" for layer, width in widths.items()])
    return f"Not a multiple of 8 wide: {layers}."


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


def print_detail(console: Console, label: str, lines: Sequence[str]) -> None:
    """Print the label once with the lines beside it. Long paths are not broken, so that they can be copied."""
    for number, line in enumerate(lines):
        console.print(f"{'' if number else label:<{LABEL}}{line}", soft_wrap=True)


def wrap(items: Sequence[str], width: int) -> list[str]:
    """Separate items by commas, in as few lines as possible; an item is never broken."""
    lines: list[str] = []
    for number, item in enumerate(items):
        text = item + ("," if number < len(items) - 1 else "")
        if lines and len(lines[-1]) + 1 + len(text) <= width:
            lines[-1] += " " + text
        else:
            lines.append(text)
    return lines


def wrap_words(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

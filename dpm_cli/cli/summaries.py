"""Print the results of train, evaluate, export, inspect and compare as text."""

import csv
import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dpm_cli.cli.compared import ComparedRun
from dpm_cli.cli.tables import (
    LABEL,
    fold_path,
    make_console,
    make_table,
    measure_width,
    print_detail,
    print_folded,
    print_table,
)
from dpm_cli.display import numbers
from dpm_cli.display.facts import (
    KINDS,
    RUNTIMES,
    describe_doubt,
    describe_export,
    describe_kept,
    describe_odd_widths,
    describe_widths,
    wrap_words,
)
from dpm_cli.report import ExportedFile, Milliseconds
from dpm_cli.results import (
    Benchmarked,
    Evaluated,
    Examined,
    Inspected,
    PlannedRun,
    PlannedTarget,
    Predicted,
    Sensitivity,
    Trained,
)

NAME_WIDTH = 16
COPIED = ("file", "weights")  # rows with a path, which is never broken
CSV_COLUMNS = "group layers units removed macs_saved accuracy accuracy_change loss loss_change".split()


def print_trained(result: Trained) -> None:
    _print_pairs(
        [
            ("model", result.arch),
            ("test accuracy", numbers.percent(result.accuracy)),
            ("validation", numbers.percent(result.validation_accuracy)),
            ("parameters", numbers.count(result.params)),
            ("epochs", f"{result.epochs} in {numbers.duration(result.seconds)}"),
            ("weights", f"{result.path}  {numbers.size(result.bytes)}"),
        ]
    )


def print_examined(result: Examined) -> None:
    """List the files, one a line, and then what to do next, each on a line that can be copied."""
    console = make_console()
    width = max((len(each.name) for each in result.files), default=0)
    for each in result.files:
        name = "".join(char if char.isprintable() else "?" for char in each.name)
        state = "" if each.state == "whole" else f"{each.state}: "
        console.print(f"{name:<{width}}  {numbers.size(each.bytes):>9}  {state}{each.what}", soft_wrap=True)
    if result.others:
        console.print(f"{result.others} others, which no run touches")
    for sentence in result.advice:
        console.print(sentence, soft_wrap=True)


def print_evaluated(result: Evaluated) -> None:
    pairs = [
        ("file", f"{result.file}  ({result.kind})"),
        ("MACs", numbers.count(result.macs)),
        ("parameters", numbers.count(result.params)),
    ]
    if result.loss is not None:
        pairs += [("test accuracy", numbers.percent(result.accuracy)), ("test loss", f"{result.loss:.4f}")]
    if result.unreadable:
        pairs.append(("left out", f"{result.unreadable} unreadable images"))
    pairs.append(("size", numbers.size(result.bytes)))
    pairs += [_describe_latency(runtime, latency, "single images") for runtime, latency in result.latency.items()]
    for runtime, latency in result.latency_in_batches.items():
        speed = 1000 * latency.batch / latency.median
        pairs.append(_describe_latency(runtime, latency, f"batches of {latency.batch}, {speed:.0f} images/s"))
    _print_pairs(pairs)
    notes = [
        describe_doubt(f"in {RUNTIMES.get(runtime, runtime)}", latency.doubt)
        for measured in (result.latency, result.latency_in_batches)
        for runtime, latency in measured.items()
        if latency.doubt
    ]
    if result.odd_widths:
        odd = describe_odd_widths(result.odd_widths)
        notes.append(f"{odd} An unrounded width can cost as much as the next multiple of 8.")
    console = make_console()
    for note in notes:
        print_detail(console, "note", wrap_words(note, console.width - LABEL))


def _describe_latency(runtime: str, latency: Milliseconds, images: str) -> tuple[str, str]:
    """Return a label and a value. images: what one call takes."""
    threads = "" if latency.threads is None else f"{latency.threads} thread{'s' if latency.threads != 1 else ''}, "
    median, low, high = (numbers.milliseconds(value) for value in (latency.median, latency.low, latency.high))
    return f"latency, {RUNTIMES.get(runtime, runtime)}", f"{median}  (quartiles {low} to {high}; {threads}{images})"


def print_benchmarked(rows: Sequence[Benchmarked]) -> None:
    """Print one line per file, runtime, batch size and number of threads."""
    doubts = dict.fromkeys(row.doubt for row in rows if row.doubt)
    marks = {doubt: f"*{number}" for number, doubt in enumerate(doubts, 1)}
    cells = [
        (
            RUNTIMES.get(row.runtime, row.runtime),
            str(row.batch),
            str(row.threads),
            numbers.milliseconds(row.median),
            f"{row.images_per_second:.0f}",
            f"{row.faster:.2f}×",
            marks.get(row.doubt or "", ""),
        )
        for row in rows
    ]
    console = make_console()

    def fill(files: Sequence[str]) -> Table:
        table = make_table("file", "runtime", "batch", "threads", "latency", "images/s", "faster", "", title=None)
        for file, others in zip(files, cells):
            table.add_row(file, *others)
        return table

    room = console.width - measure_width(console, fill([""] * len(rows))) + len("file")
    print_table(console, fill([row.file if not console.is_terminal else fold_path(row.file, room) for row in rows]))
    if any(row.threads == 1 for row in rows):
        print_folded(
            console,
            "of one thread by processor time, which other programs do not slow down",
            label=f"{'faster':<{LABEL}}",
        )
    for doubt, mark in marks.items():
        print_folded(console, f"may be wrong: {doubt}", label=f"{mark:<{LABEL}}")


def print_exported(exported: Sequence[ExportedFile]) -> None:
    console = make_console()
    for made in exported:
        console.print(describe_export(made), soft_wrap=True)


def print_predicted(predicted: Sequence[Predicted]) -> None:
    """Print one line per picture, best class first."""
    console = make_console()
    for each in predicted:
        guesses = [f"{guess.name} {numbers.percent(100 * guess.probability, 1)}" for guess in each.classes]
        console.print(f"{each.image}  " + "  ".join(guesses), soft_wrap=True)


def print_plan(plan: Inspected) -> None:
    """Print what can be pruned, how far, and what cannot."""
    console = make_console()
    console.print(f"{plan.arch or 'model'}: {len(plan.groups)} groups of tied layers", style="bold")
    console.print(_group_table(plan))
    console.print(_cost_table(plan))
    if plan.sensitivity is not None:
        _print_sensitivity(console, plan.sensitivity)
    width = console.width - LABEL
    print_detail(console, "target", wrap_words(_describe_target(plan.target), width))
    print_detail(console, "widths", [f"multiples of {plan.round_to}", *describe_widths(plan.widths or (), width)])
    print_detail(console, "kept", describe_kept(plan.kept, width, plan.dense["macs"]))
    if plan.run is not None:
        print_detail(console, "run", wrap_words(_describe_run(plan.run), width))
    print_detail(console, "code", [f"{setting}: {name}, which this recipe runs" for setting, name in plan.code.items()])


def _describe_run(run: PlannedRun) -> str:
    images = f"{run.train} images to train on, {run.validation} for validation, {run.test} to test on"
    if not run.rounds:
        return images
    rounds = f"{run.rounds} round{'s' if run.rounds > 1 else ''}"
    pace = f"units decay over {run.decay_steps} steps" if run.decay_steps > 1 else "units are cut at once"
    return f"{images}; {run.steps_per_epoch} steps an epoch; {rounds}, {pace}"


def _group_table(plan: Inspected) -> Table:
    table = make_table("group", "layers", "units", "at least", "planned", title=None)
    for group in plan.groups:
        planned = numbers.NOTHING if group.planned is None else str(group.planned)
        table.add_row(group.name, str(len(group.layers)), str(group.units), str(group.lowest), planned)
    return table


def _cost_table(plan: Inspected) -> Table:
    table = make_table("", "dense", "smallest", "", "planned", "", title=None)
    for kind, dense in plan.dense.items():
        low, reached = plan.lowest[kind], plan.planned[kind] if plan.planned else None
        table.add_row(
            KINDS[kind],
            numbers.cost(kind, dense),
            numbers.cost(kind, low),
            numbers.percent(100 * low / dense if dense else None, 1),
            numbers.NOTHING if reached is None else numbers.cost(kind, reached),
            numbers.percent(100 * reached / dense if reached is not None and dense else None, 1),
        )
    return table


def _describe_target(target: PlannedTarget) -> str:
    if target.kind == "drop":
        return f"drop {numbers.asked(target.kind, target.asked)}: what it allows is seen only in training"
    asked = numbers.asked(target.kind, target.asked)
    verdict = "can be met" if target.is_achievable else "cannot be met"
    return f"{target.kind} {asked}: at most {numbers.cost(target.kind, target.limit)}, {verdict}"


def refuse(plan: Inspected) -> str:
    """Say that the target cannot be met, what can, and which settings to change."""
    kind = plan.target.kind
    counted = "macs" if kind == "drop" else kind
    low, high = (numbers.cost(counted, costs[counted]) for costs in (plan.lowest, plan.dense))
    reach = f"from {low} to just below {high} can" if plan.groups else "no unit can be removed, for the reasons above"
    return (
        f"target {kind} {numbers.asked(kind, plan.target.asked)} cannot be met: {reach}; "
        "change prune.target, prune.min_keep, prune.round_to or prune.keep"
    )


def sensitivities_as_csv(measured: Sensitivity) -> str:
    """Write one line per group; changes are relative to the whole model. Layers are separated by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for group in measured.groups:
        changes = {
            "accuracy_change": group.accuracy - measured.accuracy,
            "loss_change": group.loss - measured.loss,
            "layers": " ".join(group.layers),
        }
        writer.writerow(group.to_dict() | changes)
    return text.getvalue()


def print_compared(rows: Sequence[ComparedRun]) -> None:
    """Print one line per run: what is left, what that cost in accuracy, and what it gained in speed."""
    table = make_table("run", "model", "MACs", "left", "params", "accuracy", "change", "faster", title=None)
    runtimes = {_runtime_of(row) for row in rows} - {None}
    for row in rows:
        faster = row.faster_onnxruntime or row.faster_torch
        named = f" {RUNTIMES[runtime]}" if len(runtimes) > 1 and (runtime := _runtime_of(row)) else ""
        table.add_row(
            row.run,
            row.arch or numbers.NOTHING,
            numbers.count(row.macs),
            numbers.percent(100 * row.macs / row.macs_dense if row.macs_dense else None, 1),
            numbers.count(row.params),
            numbers.percent(row.accuracy),
            numbers.points_change(row.accuracy_dense, row.accuracy).removesuffix(" points"),
            (f"{faster:.2f}×{named}" if faster else numbers.NOTHING) + ("" if row.met else " *"),
        )
    console = make_console()
    print_table(console, table)
    if runtimes:
        names = " or ".join(sorted(RUNTIMES[runtime] for runtime in runtimes if runtime))
        console.print(f"faster: latency of single images in {names}, dense / slim")
    if not all(row.met for row in rows):
        console.print("* the target was not met")


def _runtime_of(row: ComparedRun) -> str | None:
    """Return the runtime that the gain in speed belongs to."""
    return "onnxruntime" if row.faster_onnxruntime else "torch" if row.faster_torch else None


def _print_sensitivity(console: Console, measured: Sensitivity) -> None:
    """Print a row per group; those that are worth least come first."""
    console.print(
        f"accuracy {numbers.percent(measured.accuracy)}, loss {measured.loss:.4f} on {measured.images} "
        f"{measured.split} images; when one group alone loses {measured.share:g} of its units:",
        soft_wrap=True,
    )
    table = make_table("group", "units", "removed", "MACs saved", "accuracy", "", "loss", title=None)
    for group in sorted(measured.groups, key=lambda group: group.loss):
        table.add_row(
            group.group,
            str(group.units),
            str(group.removed),
            numbers.percent(100 * group.macs_saved, 1),
            numbers.percent(group.accuracy),
            numbers.points_change(measured.accuracy, group.accuracy),
            f"{group.loss:.4f}",
        )
    console.print(table)


def _print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    console = make_console()
    width = max(NAME_WIDTH, *(len(name) + 2 for name, _ in pairs))
    for name, value in pairs:
        if name in COPIED:
            console.print(f"{name:<{width}}{value}", soft_wrap=True)
        else:
            print_folded(console, value, label=f"{name:<{width}}")

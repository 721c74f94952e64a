"""The results of train, evaluate, export and inspect, as text."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from dpm_cli.cli import numbers
from dpm_cli.cli.tables import (
    KINDS,
    LABEL,
    RUNTIMES,
    describe_export,
    describe_kept,
    describe_odd_widths,
    describe_widths,
    make_console,
    make_table,
    print_detail,
    wrap_words,
)
from dpm_cli.report import ExportedFile, KeptLayer, Width

NAME_WIDTH = 16


def print_trained(result: dict[str, Any]) -> None:
    _print_pairs(
        [
            ("model", str(result["arch"])),
            ("test accuracy", numbers.percent(result["accuracy"])),
            ("validation", numbers.percent(result["validation_accuracy"])),
            ("parameters", numbers.count(result["params"])),
            ("epochs", f"{result['epochs']} in {numbers.duration(result['seconds'])}"),
            ("weights", f"{result['path']}  {numbers.size(result['bytes'])}"),
        ]
    )


def print_evaluated(result: dict[str, Any]) -> None:
    latencies = []
    for runtime, read in [*result["latency"].items(), *result.get("latency_in_batches", {}).items()]:
        batch = read.get("batch", 1)
        images = f"batches of {batch}, {1000 * batch / read['median']:.0f} images/s" if batch > 1 else "single images"
        latencies.append(
            (
                f"latency, {RUNTIMES.get(runtime, runtime)}",
                f"{numbers.milliseconds(read['median'])}  (quartiles {numbers.milliseconds(read['low'])} to "
                f"{numbers.milliseconds(read['high'])}; {images})",
            )
        )
    _print_pairs(
        [
            ("file", f"{result['file']}  ({result['kind']})"),
            ("MACs", numbers.count(result["macs"])),
            ("parameters", numbers.count(result["params"])),
            *(
                [
                    ("test accuracy", numbers.percent(result["accuracy"])),
                    ("test loss", f"{result['loss']:.4f}"),
                ]
                if result["images"]
                else []
            ),
            *([("left out", f"{result['unreadable']} unreadable images")] if result["unreadable"] else []),
            ("size", numbers.size(result["bytes"])),
            *latencies,
        ]
    )
    if odd := result.get("odd_widths"):
        console = make_console()
        note = f"{describe_odd_widths(odd)} An unrounded width can cost as much as the next multiple of 8."
        print_detail(console, "note", wrap_words(note, console.width - LABEL))


def print_exported(exported: Sequence[ExportedFile]) -> None:
    console = make_console()
    for made in exported:
        console.print(describe_export(made), soft_wrap=True)


def print_plan(plan: dict[str, Any]) -> None:
    """What can be pruned, what cannot, and how far."""
    console = make_console()
    groups = make_table("group", "layers", "units", "at least", "planned", title=None)
    for group in plan["groups"]:
        planned = str(group.get("planned", numbers.NOTHING))
        groups.add_row(group["name"], str(len(group["layers"])), str(group["units"]), str(group["lowest"]), planned)
    console.print(f"{plan['arch'] or 'model'}: {len(plan['groups'])} groups of tied layers", style="bold")
    console.print(groups)

    costs = make_table("", "dense", "smallest", "", "planned", "", title=None)
    for kind, (low, high) in plan["achievable"].items():
        reached = plan.get("planned", {}).get(kind)
        costs.add_row(
            KINDS[kind],
            numbers.cost(kind, high),
            numbers.cost(kind, low),
            numbers.percent(100 * low / high, 1),
            numbers.NOTHING if reached is None else numbers.cost(kind, reached),
            numbers.NOTHING if reached is None else numbers.percent(100 * reached / high, 1),
        )
    console.print(costs)
    if "sensitivity" in plan:
        _print_sensitivity(console, plan["sensitivity"])

    target = plan["target"]
    kind = target["kind"]
    asked = f"{target['asked']:g}" if target["asked"] < 1 else numbers.cost(kind, target["asked"])
    verdict = "can be met" if target["achievable"] else "cannot be met"
    width = console.width - LABEL
    print_detail(
        console,
        "target",
        wrap_words(f"{kind} {asked}: at most {numbers.cost(kind, target['limit'])}, {verdict}", width),
    )
    widths = [Width(**each) for each in plan.get("widths", [])]
    print_detail(console, "widths", [f"multiples of {plan['round_to']}", *describe_widths(widths, width)])
    print_detail(console, "kept", describe_kept([KeptLayer(**kept) for kept in plan["kept"]], width))


def print_compared(rows: Sequence[dict[str, Any]]) -> None:
    """One line a run: what is left, what it cost in accuracy, and what it gained in speed."""
    table = make_table("run", "model", "MACs", "left", "params", "accuracy", "change", "faster", title=None)
    for row in rows:
        faster = row["faster_onnxruntime"] or row["faster_torch"]
        table.add_row(
            row["run"],
            row["arch"] or numbers.NOTHING,
            numbers.count(row["macs"]),
            numbers.percent(100 * row["macs"] / row["macs_dense"] if row["macs_dense"] else None, 1),
            numbers.count(row["params"]),
            numbers.percent(row["accuracy"]),
            numbers.points_change(row["accuracy_dense"], row["accuracy"]).removesuffix(" points"),
            (f"{faster:.2f}×" if faster else numbers.NOTHING) + ("" if row["met"] else " *"),
        )
    console = make_console()
    if not console.is_terminal:  # the names of many runs are long; in a pipe no line need be broken
        console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
    if not all(row["met"] for row in rows):
        console.print("* the target was not met")


def _print_sensitivity(console: Console, measured: dict[str, Any]) -> None:
    """The groups that are worth least come first."""
    console.print(
        f"accuracy {numbers.percent(measured['accuracy'])}, loss {measured['loss']:.4f} on {measured['images']} "
        f"{measured['split']} images; when one group alone loses {measured['share']:g} of its units:",
        soft_wrap=True,
    )
    table = make_table("group", "units", "removed", "MACs saved", "accuracy", "", "loss", title=None)
    for row in sorted(measured["groups"], key=lambda row: row["loss"]):
        table.add_row(
            row["group"],
            str(row["units"]),
            str(row["removed"]),
            numbers.percent(100 * row["macs_saved"], 1),
            numbers.percent(row["accuracy"]),
            numbers.points_change(measured["accuracy"], row["accuracy"]),
            f"{row['loss']:.4f}",
        )
    console.print(table)


def _print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    console = make_console()
    width = max(NAME_WIDTH, *(len(name) + 2 for name, _ in pairs))
    for name, value in pairs:
        console.print(f"{name:<{width}}{value}", soft_wrap=True)

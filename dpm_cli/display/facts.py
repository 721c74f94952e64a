"""Say in words what a report says: the rows of its table, and the details below it."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from dpm_cli.display import numbers
from dpm_cli.errors import listing
from dpm_cli.report import ExportedFile, KeptLayer, Report, Width

RUNTIMES = {
    "torch": "torch",
    "onnxruntime": "ONNX Runtime",
    "torchscript": "TorchScript",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
    "tensorrt": "TensorRT",
}
KINDS = {"macs": "MACs", "params": "parameters", "channels": "units", "size": "float32 size", "latency": "latency"}
GLUE = "\0"  # in place of a space at which no line breaks
BEFORE_UNIT = re.compile(r"(?<=\d) (?=(%|[KMGT]?B|[KMGT]|m?s|min|h|points?|images?|threads?)(?!\w))")
MOST_LAYERS = 60  # longer lists of layers are cut
DISAPPOINTING = 0.5  # gains in speed below this share of the gain in MACs get a note


def title(report: Report) -> str:
    target = report.target
    asked = numbers.asked(target.kind, target.asked)
    share = f"{100 * target.reached / target.dense:.1f} %" if target.dense else numbers.NOTHING
    reached, limit = (numbers.cost(target.kind, cost) for cost in (target.reached, target.limit))
    name = report.arch or "model"
    if report.sparsities:
        return f"{name}, {report.base}, target sparsity {asked}: {share} of the weights left ({reached})"
    if target.kind == "drop" and not target.is_met:
        return f"{name}, {report.method}, target drop {asked}: nothing could be removed"
    if target.kind == "drop":
        return f"{name}, {report.method}, target drop {asked}: {share} of the MACs left ({reached})"
    if report.targets:
        asked = ", ".join(f"{each.kind} {numbers.asked(each.kind, each.asked)}" for each in report.targets)
        left = ", ".join(f"{100 * each.reached / each.dense:.1f} % {each.kind}" for each in report.targets)
        return f"{name}, {report.method}, target {asked}: {left} left"
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
        (
            "weights" if report.sparsities else "state dict",  # packed; or with buffers, which no target counts
            numbers.size(dense.bytes),
            numbers.size(slim.bytes),
            numbers.cost_change(dense.bytes, slim.bytes),
        ),
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
    yield "kept", describe_kept(report.kept, width, report.dense.macs)
    yield "latency", [f"median over single images, warm, {_threads(report)}in turns"] if report.dense.latency else []
    more = [each.file for each in report.sparsities[1:]]
    yield "files", [*(path for name, path in report.files.items() if name in ("slim", "report")), *more]
    yield "exports", [describe_export(made) for made in report.exports]
    seconds = [f"{name} {numbers.duration(spent)}" for name, spent in report.seconds.items()]
    yield "time", wrap([*seconds, f"on {report.device} in {report.precision}", f"seed {report.seed}"], width)
    for note in [*doubts(report), *disappointments(report), *report.notes]:
        yield "note", wrap_words(note, width)


def describe_widths(widths: Sequence[Width], width: int) -> list[str]:
    """List the output channels, before → after, of every layer that changed."""
    changed = [f"{each.layer} {each.before}→{each.after}" for each in widths if each.before != each.after]
    unchanged = len(widths) - len(changed)
    more = [f"{len(changed) - MOST_LAYERS} more in report.json"] if len(changed) > MOST_LAYERS else []
    same = [f"{unchanged} unchanged"] if unchanged else []
    return wrap([*changed[:MOST_LAYERS], *more, *same], width)


def describe_kept(kept: Sequence[KeptLayer], width: int, macs: int | None = None) -> list[str]:
    """List the layers whose outputs stayed whole, gathered by reason, the costliest reason first.

    macs: of the dense model, to tell each reason's share.
    """
    reasons: dict[str, dict[str, int]] = {}  # reason -> its layers -> their MACs
    for each in kept:
        reasons.setdefault(_without_place(each.reason), {})[each.layer] = each.macs
    lines: list[str] = []
    for reason, layers in sorted(reasons.items(), key=lambda each: (-sum(each[1].values()), each[0])):
        spent = sum(layers.values())
        share = f"{numbers.percent(100 * spent / macs, 1)} of MACs, " if macs and spent else ""
        lines += wrap_words(f"{share}{listing(layers)}: {reason}", width)
    return lines


def _without_place(reason: str) -> str:
    """Drop the layer that a reason begins with: reasons of many layers are one."""
    return re.sub(r"^\S+: (?=.* )", "", reason)


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
    """Return a sentence if some latencies may be wrong."""
    doubtful = {
        f"{name} in {RUNTIMES.get(runtime, runtime)}": latency.doubt
        for name, network in (("dense", report.dense), ("slim", report.slim))
        for runtime, latency in network.latency.items()
        if latency.doubt
    }
    return [describe_doubt(f"of {', '.join(doubtful)}", *list(doubtful.values())[:1])] if doubtful else []


def describe_doubt(what: str, why: str) -> str:
    return f"the latency {what} may be wrong: {why}; measure again while nothing else runs, with dpm evaluate"


def praise(report: Report) -> str:
    """Say in one sentence what was gained, and at what price."""
    dense, slim = report.dense, report.slim
    gains = [
        f"{dense.macs / slim.macs:.1f}× fewer multiply-accumulates" if slim.macs else "",
        f"{dense.bytes / slim.bytes:.1f}× smaller" if slim.bytes else "",
    ]
    for runtime in ("onnxruntime", "torch"):
        before, after = dense.latency.get(runtime), slim.latency.get(runtime)
        if before and after and before.median > after.median:
            gains.append(f"{before.median / after.median:.1f}× faster in {RUNTIMES[runtime]}")
            break
    price = ""
    if dense.accuracy is not None and slim.accuracy is not None:
        lost = dense.accuracy - slim.accuracy
        price = f", for {lost:.2f} points of accuracy" if lost >= 0.005 else ", at no loss of accuracy"
    return f"Gained: {', '.join(filter(None, gains))}{price}."


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
    """Break a text between words, but never a number from its unit."""
    lines = textwrap.wrap(BEFORE_UNIT.sub(GLUE, text), width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(GLUE, " ") for line in lines]

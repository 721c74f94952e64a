"""Draw the charts of a run as SVG that takes its colours from the page around it, light or dark."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpm_cli.display import numbers
from dpm_cli.display.facts import RUNTIMES
from dpm_cli.display.history import History
from dpm_cli.report import Report

# Colours that nothing else has; the page replaces each by a variable of its style sheet.
INK, FAINT, DENSE, SLIM, WARM, THIRD = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
VARIABLES = {INK: "ink", FAINT: "faint", DENSE: "dense", SLIM: "slim", WARM: "warm", THIRD: "third"}
WIDTH, HEIGHT = 5.2, 3.1  # inches, of which a phone shows three quarters
LONGEST_NAME = 26  # letters of a layer
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "axes.prop_cycle": cycler(color=[SLIM]),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Chart:
    """A picture, and what it says in words."""

    title: str
    text: str
    svg: str


def draw_charts(report: Report, history: History) -> list[Chart]:
    """Draw what there is data for."""
    drawn = [
        _draw(name, make, report, history)
        for name, make in (
            ("widths", _widths),
            ("lives", _lives),
            ("norms", _norms),
            ("training", _training),
            ("rate", _rate),
            ("latency", _latency),
        )
    ]
    return [chart for chart in drawn if chart]


Make = Callable[[Figure, Report, History], tuple[str, str] | None]  # title and text; None if there is nothing to show


def _draw(name: str, make: Make, report: Report, history: History) -> Chart | None:
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        said = make(figure, report, history)
        if said is None:
            return None
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return Chart(*said, _adapt(content.getvalue(), name))


def _adapt(svg: str, name: str) -> str:
    """Make an SVG fit into a page: colours of the style sheet, names of its own, the size of its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<=\sid=")', f"{name}-", svg)
    svg = re.sub(r'(?<=href="#)|(?<=url\(#)', f"{name}-", svg)
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def _widths(figure: Figure, report: Report, history: History) -> tuple[str, str] | None:
    changed = [width for width in report.widths if width.after != width.before]
    if not changed:
        return None
    figure.set_size_inches(WIDTH, max(HEIGHT, 0.6 + 0.19 * len(changed)))
    axes = figure.add_subplot()
    places = range(len(changed))
    axes.barh(places, [width.before for width in changed], color=DENSE, height=0.75, label="before")
    axes.barh(places, [width.after for width in changed], color=SLIM, height=0.75, label="after")
    axes.set_yticks(places, [_shorten(width.layer) for width in changed], fontsize=8)
    axes.set_ylim(len(changed) - 0.4, -0.6)
    axes.set_xlabel("output channels")
    axes.grid(axis="y", visible=False)
    _add_legend(axes)
    left = sum(width.after for width in changed) / sum(width.before for width in changed)
    least = min(changed, key=lambda width: width.after / width.before)
    return "Widths of the layers", (
        f"{len(changed)} of {len(report.widths)} layers got narrower; together they keep "
        f"{numbers.percent(100 * left, 0)} of their outputs. Most lost {least.layer}: {least.before} → {least.after}."
    )


def _lives(figure: Figure, report: Report, history: History) -> tuple[str, str] | None:
    looks = history.units
    if not looks:
        return None
    axes = figure.add_subplot()
    steps = [look["at"] for look in looks]
    removed = [look["removed"] + look["dead"] for look in looks]
    decaying = [look["decaying"] for look in looks]
    axes.stackplot(steps, removed, decaying, colors=[SLIM, WARM], labels=["dead or removed", "decaying"])
    axes.plot(steps, [look["released"] for look in looks], color=THIRD, label="released so far")
    axes.set_ylabel("units")
    _finish_steps(axes, history)
    _add_legend(axes)
    units = report.units
    return "The lives of the units", (
        f"{units.chosen} times a unit was chosen and began to decay; {units.released} were released because training "
        f"fought for them, {units.removed} of {units.total} were removed."
    )


def _norms(figure: Figure, report: Report, history: History) -> tuple[str, str] | None:
    lives: dict[tuple[int, str], list[tuple[int, float]]] = {}
    freed: set[tuple[int, str]] = set()
    for look in history.units:
        freed |= {(look["round"], unit) for unit in look["freed"]}
        for unit, norm in look["norms"].items():
            lives.setdefault((look["round"], unit), []).append((look["at"], norm))
    lives = {key: life for key, life in lives.items() if len(life) > 1}
    if not lives:
        return None
    axes = figure.add_subplot()
    for key, life in lives.items():
        axes.plot(*zip(*life), color=THIRD if key in freed else SLIM, linewidth=1.6 if key in freed else 1)
    axes.plot([], [], color=SLIM, label="decaying")
    axes.plot([], [], color=THIRD, label="released")
    _add_legend(axes)
    axes.set_ylabel("norm, as a fraction of the start")
    axes.set_ylim(bottom=0)
    _finish_steps(axes, history)
    return "Norms of a sample of units", (
        f"{len(lives)} of the chosen units, each from the start of its decay: {len(lives.keys() - freed)} shrink to "
        f"zero, {len(lives.keys() & freed)} were released on the way and live on."
    )


def _training(figure: Figure, report: Report, history: History) -> tuple[str, str] | None:
    if not history.epochs:
        return None
    axes = figure.add_subplot()
    steps, losses = ([epoch[key] for epoch in history.epochs] for key in ("at", "loss"))
    axes.plot(steps, losses, color=SLIM, marker="o", markersize=3, clip_on=False, label="training loss")
    axes.set_ylabel("loss")
    handles = axes.get_lines()[:1]
    scored = [epoch for epoch in history.epochs if epoch.get("validation_accuracy") is not None]
    text = f"The training loss was {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last."
    if scored:
        right = axes.twinx()
        right.grid(visible=False)
        right.spines["right"].set_visible(True)
        accuracies = [epoch["validation_accuracy"] for epoch in scored]
        handles += right.plot(
            [epoch["at"] for epoch in scored],
            accuracies,
            color=WARM,
            marker="s",
            markersize=3,
            clip_on=False,
            label="validation",
        )
        right.set_ylabel("validation accuracy, %")
        text += (
            f" Validation accuracy was {accuracies[0]:.1f} % after the first epoch, {accuracies[-1]:.1f} % at the end."
        )
    _finish_steps(axes, history)
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    rounds = len(history.rounds)
    return "Loss and accuracy", f"{text} {_count(rounds, 'round')} of pruning began at the dotted lines."


def _rate(figure: Figure, report: Report, history: History) -> tuple[str, str] | None:
    if len(history.epochs) < 2:
        return None
    axes = figure.add_subplot()
    steps, rates = ([epoch[key] for epoch in history.epochs] for key in ("at", "lr"))
    axes.plot(steps, rates, color=DENSE, marker="o", markersize=3)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    _finish_steps(axes, history)
    names = [name for name, _ in history.stages]
    return (
        "Learning rate",
        f"At the end of each epoch, from {rates[0]:.2g} to {rates[-1]:.2g}; stages: {', '.join(names)}.",
    )


def _latency(figure: Figure, report: Report, history: History) -> tuple[str, str] | None:
    runtimes = [runtime for runtime in report.dense.latency if runtime in report.slim.latency]
    if not runtimes:
        return None
    axes = figure.add_subplot()
    said = []
    for shift, colour, name, network in ((-0.19, DENSE, "dense", report.dense), (0.19, SLIM, "slim", report.slim)):
        taken = [network.latency[runtime] for runtime in runtimes]
        spread = [[each.median - each.low for each in taken], [each.high - each.median for each in taken]]
        axes.barh(
            [place + shift for place in range(len(runtimes))], [each.median for each in taken], 0.36,
            xerr=spread, color=colour, ecolor=INK, capsize=3, label=name,
        )  # fmt: skip
        said += [
            f"{RUNTIMES.get(runtime, runtime)}, {name}: {numbers.milliseconds(each.median)} "
            f"(quartiles {numbers.milliseconds(each.low)} to {numbers.milliseconds(each.high)})"
            for runtime, each in zip(runtimes, taken)
        ]
    axes.set_yticks(range(len(runtimes)), [RUNTIMES.get(runtime, runtime) for runtime in runtimes])
    axes.set_xlabel("milliseconds for one image; the whiskers are quartiles")
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    _add_legend(axes)
    return "Latency", "; ".join(said) + "."


def _finish_steps(axes: Any, history: History) -> None:
    """Mark rounds by dotted lines and stages by names, and label the axis."""
    for entry in history.rounds:
        axes.axvline(entry["at"], color=INK, linestyle=":", linewidth=0.8)
    for name, began in history.stages:
        axes.text(began, 1.01, f" {name}", transform=axes.get_xaxis_transform(), fontsize=8, va="bottom")
    axes.set_xlim(0, max(1, history.steps))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("optimizer steps")


def _add_legend(axes: Any) -> None:
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)


def _shorten(layer: str) -> str:
    return layer if len(layer) <= LONGEST_NAME else f"…{layer[1 - LONGEST_NAME :]}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"

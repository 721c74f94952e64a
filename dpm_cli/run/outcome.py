"""Describe what a run did to a model, before anything is measured."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpm_cli.data import Splits
from dpm_cli.errors import listing
from dpm_cli.events import Wanted
from dpm_cli.method.budget import cost_of
from dpm_cli.method.pruners import BasePruner
from dpm_cli.method.pruning import Pruning
from dpm_cli.recipe import Recipe
from dpm_cli.recipe.sections import Decay
from dpm_cli.report import FloorReport, KeptLayer, TargetReport, UnitCounts, Width
from dpm_cli.run.accuracy_floor import AccuracyFloor
from dpm_cli.run.subject import Subject
from dpm_cli.sparse.cut import CutModel
from dpm_cli.tasks.classification import is_at_chance


@dataclass(frozen=True)
class Outcome:
    """Holds what a report says besides measurements."""

    method: str
    target: TargetReport  # of several, the one that came closest to its limit
    units: UnitCounts
    widths: Sequence[Width]
    kept: Sequence[KeptLayer]
    difference: float  # largest relative difference between outputs before and after a removal
    validation_accuracy: float | None  # percent, of the slim model
    notes: Sequence[str]
    predicted: tuple[int, int]  # MACs and parameters of the slim model
    remarks: Sequence[str] = ()  # to follow those on the cost
    floor: FloorReport | None = None
    targets: Sequence[TargetReport] = ()  # all, if there are several
    cuts: Sequence[CutModel] = ()  # models with single weights cut; the first one is the slim model
    taught: bool = False  # by the dense model


def describe_outcome(
    subject: Subject, floor: AccuracyFloor, validation_accuracy: float | None, notes: Sequence[str]
) -> Outcome:
    """Describe the outcome of a run that removed units."""
    recipe, pruning, groups = subject.recipe, subject.pruning, subject.dense_groups
    cost, alive, targets = pruning.groups.cost, pruning.all_alive, list(_compare_with_target(subject))
    return Outcome(
        method=name_method(pruning.base, recipe.decay, pruning.decay.steps),
        target=max(targets, key=lambda each: each.reached / each.limit if each.limit else 0.0),
        targets=targets if len(targets) > 1 else (),
        units=UnitCounts(groups.units, pruning.chosen, pruning.released, int((~pruning.ancestry.survivors).sum())),
        widths=[Width(*width) for width in groups.widths(pruning.ancestry.survivors)],
        kept=[KeptLayer(kept.layer, kept.reason, kept.macs) for kept in (*groups.kept, *pruning.ancestry.kept)],
        difference=subject.difference,
        validation_accuracy=validation_accuracy,
        notes=notes,
        remarks=[*_remark_on_pruning(recipe, pruning), *([subject.meter.note] if subject.meter else [])],
        predicted=(cost.macs(alive), cost.parameters(alive)),
        floor=floor.report(),
        taught=subject.teacher is not None,
    )


def describe_target(subject: Subject) -> Wanted:
    """Describe the target before anything is trained."""
    goal, asked = subject.pruning.goal, subject.pruning.goal.asked
    if len(asked) == 1:
        return Wanted(str(goal.kind), goal.limit, subject.pruning.dense_cost)
    if asked:
        return Wanted(str(goal.kind), asked=tuple(amount for amount, _ in asked.values()))
    return Wanted("drop", asked=(subject.recipe.prune.target.drop or 0.0,))


def _compare_with_target(subject: Subject) -> Iterator[TargetReport]:
    """Compare what was asked for with what was reached, for each limit; without any, tell the MACs that are left."""
    pruning, dense = subject.pruning, subject.dense_groups
    everything = np.ones(dense.units, bool)
    for kind, (amount, limit) in pruning.goal.asked.items():
        whole, left = cost_of(dense.cost, kind, everything), cost_of(pruning.groups.cost, kind, pruning.all_alive)
        yield TargetReport(str(kind), amount, limit, whole, left)
    if not pruning.goal.asked:
        drop, whole = subject.recipe.prune.target.drop, dense.cost.macs(everything)
        assert drop is not None
        yield TargetReport("drop", drop, whole, whole, pruning.groups.cost.macs(pruning.all_alive))


def name_method(base: BasePruner, decay: Decay, steps: int) -> str:
    """Name the base pruner, and DPM if it is on: one-step pruning is the base alone, as is HESSO's own envelope."""
    is_on = steps > 1 and (decay.envelope != "multiplicative" or decay.rectify is not None)
    return f"{base.title} + DPM" if is_on else base.title


def _remark_on_pruning(recipe: Recipe, pruning: Pruning) -> Iterator[str]:
    if pruning.ancestry.kept:
        layers = listing(kept.layer for kept in pruning.ancestry.kept)
        yield f"removing channels of {layers} changed outputs, so they stay whole; please report this model"
    if pruning.topped_up:
        why = "others were released" if pruning.released else f"{recipe.prune.base} marked too few in time"
        yield f"{pruning.topped_up} units were chosen by score alone, after the planned rounds: {why}"


def remark_on_cost(recipe: Recipe, predicted: tuple[int, int], measured: tuple[int, int]) -> Iterator[str]:
    """Yield what readers must know about MACs and parameters, predicted and measured."""
    if recipe.counter != "flop_counter":
        yield f"MACs are counted by {recipe.counter}; the target is held by flop_counter's"
    elif predicted != measured:
        yield f"predicted cost {predicted} differs from the measured one {measured}"


def remark_on_chance(dense: float | None, slim: float | None, splits: Splits, recipe: Recipe) -> Iterator[str]:
    """Say so if the slim model only guesses, and the dense one does not. dense, slim: test accuracies in percent."""
    if dense is None or slim is None:
        return
    images, classes = len(splits.test), recipe.model.classes
    if is_at_chance(slim, images=images, classes=classes) and not is_at_chance(dense, images=images, classes=classes):
        yield (
            f"the slim model guesses: {slim:.2f} % in {classes} classes, {dense:.2f} % before; lower train.lr "
            f"({recipe.train.lr:g}) and finetune.lr ({recipe.finetune.lr:g}), or train longer"
        )


def remark_on_teacher(dense: float | None, slim: float | None, splits: Splits) -> Iterator[str]:
    """Say so if the slim model is clearly better than the dense one that taught it. Arguments as before.

    Clearly: by more than two standard deviations of the difference of two accuracies on so many images.
    """
    if dense is None or slim is None:
        return
    noise = 200 * math.sqrt(2 * dense / 100 * (1 - dense / 100) / len(splits.test))
    if slim > dense + noise:
        yield (
            f"the slim model beats the dense one, its teacher ({slim:.2f} % to {dense:.2f} %): a dense model that does "
            "not fit the images teaches its errors; train it on them first (dpm train), or set train.distill: 0"
        )


def remark_on_data(splits: Splits) -> Iterator[str]:
    """Say what a reader must know about the images. Call after measuring, which finds unreadable streamed images."""
    if not splits.labelled:
        yield "data.labels is false: no accuracy was measured"
    if len(splits.corrupt):
        yield splits.corrupt.note
    if splits.test_held_out:
        yield "the folder has no test images: a fixed tenth of the training images served as the test set"

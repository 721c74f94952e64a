"""Tell the story of a run: train while units decay and die, remove them, fine-tune, export, measure, report."""

from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from torch import nn

from dpm_cli.engine.setup import Setup
from dpm_cli.errors import TargetError
from dpm_cli.events import Done, Event
from dpm_cli.files import METRICS
from dpm_cli.recipe import Recipe
from dpm_cli.recipe.stages import Stage
from dpm_cli.report import Report
from dpm_cli.run.accuracy_floor import AccuracyFloor
from dpm_cli.run.course import Course, CourseHooks
from dpm_cli.run.delivery import Delivery
from dpm_cli.run.journal import Journal
from dpm_cli.run.outcome import describe_outcome, describe_target
from dpm_cli.run.pruning_stage import PruningStage, SparseLearning
from dpm_cli.run.resume import Origin
from dpm_cli.run.subject import Subject
from dpm_cli.run.teacher import dismiss_guessing_

Events = Generator[Event, None, None]


class Run:
    """Carries out one pruning run. `events()` does the work, yields events and returns the report."""

    def __init__(self, recipe: Recipe, setup: Setup, model: nn.Module, *, arch: str | None, output: Path) -> None:
        """model: dense (or slim from an earlier run), in eval mode on the CPU. It is copied, not changed.

        arch: the name that builds it; None if there is none. Raises UnsupportedModelError, RecipeError or TargetError
        before any training.
        """
        setup.require_enough_images()
        torch.manual_seed(setup.seed)
        self.recipe, self.setup, self.dense, self.arch, self.output = recipe, setup, model, arch, output
        self.subject = Subject(model, recipe, setup)
        self.floor = AccuracyFloor(self.subject, recipe.prune.floor)
        self.course = Course(
            setup,
            self.subject.stages,
            self.subject,
            Origin.of(recipe, model, setup.splits),
            Journal(output / METRICS if setup.world.is_main else None),
            {"floor": self.floor},
        )
        self.course.notes += self.subject.tell_auto()

    @property
    def notes(self) -> list[str]:
        """Return notes for the user, one sentence each."""
        return self.course.notes

    def events(self, *, resume: bool = False) -> Generator[Event, None, Report]:
        """Do the run. resume: continue from the checkpoint. Raises TargetError if training ends before pruning is done.

        A floor or a target that was missed otherwise is in the report.
        """
        subject = self.subject
        target = describe_target(subject)
        yield self.course.describe_start(self.arch, subject.dense_groups, target, round_to=subject.round_to)
        report = yield from self.course.carry_out(
            self._train_and_prune(), self._finish(), resume=resume, prepare=self._judge_dense
        )
        self.course.notes += subject.notes
        yield from self.course.tell_new_notes()
        yield Done()
        return report

    def _judge_dense(self) -> Iterator[str]:
        """Measure the dense model where something depends on it: a floor, or what it teaches."""
        dense = self.floor.measure()
        return dismiss_guessing_(self.subject, self.setup, classes=self.recipe.model.classes, accuracy=dense)

    def _train_and_prune(self) -> Events:
        """Train all stages, and repeat those after pruning if the accuracy floor demands it."""
        floor, course = self.floor, self.course
        yield from self._train_stages()
        while not floor.holds():
            is_final = floor.went_back or floor.held_the_target
            culprit = "fine-tuning" if is_final else f"round {self.subject.pruning.round}"
            yield floor.go_back(culprit, stage=course.current.name, step=course.step)
            if is_final:  # fine-tuning from this state did not help
                break
            course.stage = self._stage_after_pruning
            yield course.save()
            yield from self._train_stages()

    def _train_stages(self) -> Events:
        """Train the remaining stages, then recompute the BatchNorm statistics."""
        course = self.course
        while not course.is_over:
            is_pruned = self.subject.pruning.is_done or self.floor.went_back
            if course.step or not (course.current.ends_with_pruning and is_pruned):
                yield from self._train(course.current)
            if course.stage + 1 >= self._stage_after_pruning:
                self.subject.pruning.unwrap_()
            yield from course.advance()
        pruning = self.subject.pruning
        pruning.unwrap_()
        if not pruning.is_done and not self.floor.went_back:
            goal = pruning.goal
            raise TargetError(f"target {goal} was not met: {goal.describe(pruning.cost())} is left")
        self.setup.recalibrate_(self.subject.model, course.unused_epoch, batches=self.recipe.recalibrate_batches)

    def _train(self, stage: Stage) -> Events:
        course, subject = self.course, self.subject
        if stage.prunes or stage.penalises:
            subject.pruning.base.enter(stage, subject.model, course.step)
        if stage.prunes:
            yield from course.train(PruningStage(course, subject, self.floor))
        else:
            yield from course.train(SparseLearning(course, subject) if stage.penalises else CourseHooks(course))

    @property
    def _stage_after_pruning(self) -> int:
        stages = (index for index, stage in enumerate(self.subject.stages, 1) if stage.prunes)
        return max(stages, default=len(self.subject.stages))

    def _finish(self) -> Generator[Event, None, Report]:
        """Export, measure, report and save the trained slim model."""
        setup, subject = self.setup, self.subject
        validation_accuracy = setup.validate(subject.model)
        outcome = describe_outcome(subject, self.floor, validation_accuracy, [*self.notes, *subject.notes])
        delivery = Delivery(self.recipe, setup, self.arch, self.output, self.dense, subject.layout)
        return (yield from delivery.deliver(subject.model, outcome, self.course.seconds))

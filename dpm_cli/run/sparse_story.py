"""Run Pruning On-the-Fly: train once on spheres, then cut single weights to every sparsity."""

import copy
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dpm_cli.engine.loop import StageLoop, State
from dpm_cli.engine.precision import choose_layout, lay_out_
from dpm_cli.engine.setup import Setup
from dpm_cli.events import Done, Event, Wanted, WeightsCut
from dpm_cli.files import METRICS
from dpm_cli.recipe import Recipe
from dpm_cli.recipe.stages import Stage, number_epochs
from dpm_cli.report import KeptLayer, Report, TargetReport, UnitCounts, Width
from dpm_cli.run.course import Course, CourseHooks
from dpm_cli.run.delivery import Delivery
from dpm_cli.run.journal import Journal
from dpm_cli.run.outcome import Outcome
from dpm_cli.run.resume import Origin
from dpm_cli.run.teacher import copy_teacher, dismiss_guessing_
from dpm_cli.sparse.cut import CutModel, cut_model
from dpm_cli.sparse.on_the_fly import SphereTraining, find_whole_groups
from dpm_cli.sparse.polarise import count_kept

REMARK = (
    "single weights were cut: the file is smaller, but dense kernels compute zeros (and means) as fast as any other "
    "number, so MACs and latency stay as they were; the other bases remove whole channels"
)


class SparseSubject:
    """Holds a model that is trained on spheres."""

    def __init__(self, module: nn.Module, recipe: Recipe, setup: Setup) -> None:
        self.layout = choose_layout(module, torch.zeros(2, *recipe.model.input))
        self.model = copy.deepcopy(module).to(setup.device)
        lay_out_(self.model, self.layout)
        self.stages = number_epochs([Stage("sparse", recipe.train, "train.", penalises=True)])
        self.teacher = copy_teacher(self.model, self.stages)
        self.training = SphereTraining(self.model, recipe.prune, recipe.train)
        self.is_on_spheres = True

    def unwrap_(self) -> None:
        if self.is_on_spheres:
            self.training.unwrap_(self.model)
            self.is_on_spheres = False

    def state_dict(self) -> State:
        """Return the state; its tensors are not copied."""
        state = {"epoch": self.training.epoch, "is_on_spheres": self.is_on_spheres}
        return state | {"model": self.model.state_dict()}

    def load_state_dict(self, state: State) -> None:
        if not state["is_on_spheres"]:
            self.unwrap_()
        self.training.epoch = int(state["epoch"])
        self.model.load_state_dict(state["model"])


class SphereStage(CourseHooks):
    """Adds the penalty at every step."""

    def __init__(self, course: Course, training: SphereTraining) -> None:
        super().__init__(course)
        self._training = training

    def before_step_(self) -> None:
        self._training.penalise_()

    def end_epoch(self, loop: StageLoop) -> Iterator[Event]:
        self._training.epoch += 1
        yield from ()


class SparseRun:
    """Carries out one run of Pruning On-the-Fly. `events()` does the work, yields events and returns the report."""

    def __init__(self, recipe: Recipe, setup: Setup, model: nn.Module, *, arch: str | None, output: Path) -> None:
        """Takes the same arguments as `Run`."""
        setup.require_enough_images()
        torch.manual_seed(setup.seed)
        self.recipe, self.setup, self.dense, self.arch, self.output = recipe, setup, model, arch, output
        self.groups = find_whole_groups(model, torch.zeros(2, *recipe.model.input), recipe.prune)
        self.subject = SparseSubject(model, recipe, setup)
        self.course = Course(
            setup,
            self.subject.stages,
            self.subject,
            Origin.of(recipe, model, setup.splits),
            Journal(output / METRICS if setup.world.is_main else None),
        )

    @property
    def notes(self) -> list[str]:
        """Return notes for the user, one sentence each."""
        return self.course.notes

    def events(self, *, resume: bool = False) -> Generator[Event, None, Report]:
        """Do the run. resume: continue from the checkpoint in the output folder."""
        target = Wanted("sparsity", asked=self.recipe.prune.target.sparsity or ())
        yield self.course.describe_start(self.arch, self.groups, target, round_to=1)
        report = yield from self.course.carry_out(
            self._train(), self._finish(), resume=resume, prepare=self._judge_dense
        )
        yield from self.course.tell_new_notes()
        yield Done()
        return report

    def _judge_dense(self) -> Iterator[str]:
        return dismiss_guessing_(self.subject, self.setup, classes=self.recipe.model.classes)

    def _train(self) -> Generator[Event, None, None]:
        course = self.course
        if not course.is_over:
            yield from course.train(SphereStage(course, self.subject.training))
            self.subject.unwrap_()
            yield from course.advance()
        self.subject.unwrap_()
        self._recalibrate_(self.subject.model)

    def _finish(self) -> Generator[Event, None, Report]:
        setup, cuts = self.setup, []
        for cut in self._cut():
            cuts.append(cut)
            yield WeightsCut(**vars(cut.report))
        slim = cuts[0].module
        outcome, layout = self._describe_outcome(cuts, setup.validate(slim)), self.subject.layout
        delivery = Delivery(self.recipe, setup, self.arch, self.output, self.dense, layout)
        return (yield from delivery.deliver(slim, outcome, self.course.seconds))

    def _cut(self) -> Iterator[CutModel]:
        """Cut the trained model to every sparsity that the recipe names."""
        recipe = self.recipe
        sparsities = recipe.prune.target.sparsity or ()
        for number, sparsity in enumerate(sparsities if recipe.prune.on_the_fly.threshold is None else sparsities[:1]):
            yield cut_model(
                self.subject.model,
                self.subject.training.layers,
                recipe.prune.on_the_fly,
                sparsity=sparsity,
                recalibrate_=self._recalibrate_ if recipe.recalibrate_batches else None,
                score=self.setup.test,
                file=str(self.output / (f"slim-{sparsity:g}.pt" if number else "slim.pt")),
            )

    def _recalibrate_(self, model: nn.Module) -> None:
        self.setup.recalibrate_(model, self.course.unused_epoch, batches=self.recipe.recalibrate_batches)

    def _describe_outcome(self, cuts: list[CutModel], validation_accuracy: float | None) -> Outcome:
        recipe, groups = self.recipe, self.groups
        everything = np.ones(groups.units, bool)
        return Outcome(
            method=recipe.prune.base,
            target=_report_cut(cuts[0], recipe.prune.on_the_fly.threshold),
            units=UnitCounts(groups.units, 0, 0, 0),
            widths=[Width(*width) for width in groups.widths(everything)],
            kept=[KeptLayer(kept.layer, kept.reason, kept.macs) for kept in groups.kept],
            difference=0.0,
            validation_accuracy=validation_accuracy,
            notes=[*self.notes, REMARK],
            predicted=(groups.cost.macs(everything), groups.cost.parameters(everything)),
            cuts=cuts,
            taught=self.subject.teacher is not None,
        )


def _report_cut(cut: CutModel, threshold: float | None) -> TargetReport:
    """Count the remaining weights among those that may be cut. With a threshold, any result meets the target."""
    weights = sum(mask.numel() for mask in cut.masks.values())
    kept = sum(int(mask.sum()) for mask in cut.masks.values())
    if threshold is not None:
        return TargetReport("sparsity", cut.report.reached, kept, weights, kept)
    asked = cut.report.asked
    return TargetReport("sparsity", asked, count_kept(cut.masks.values(), asked), weights, kept)

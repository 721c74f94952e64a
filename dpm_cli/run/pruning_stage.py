"""Add sparse learning and pruning rounds to the stages of training."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from itertools import islice

from dpm_cli.engine.loop import EndStage, StageLoop
from dpm_cli.engine.precision import lay_out_
from dpm_cli.events import Event, Note, RoundStarted
from dpm_cli.graph.program import Example
from dpm_cli.method.pruning import Pruning, tell_removal
from dpm_cli.method.removal import Removal
from dpm_cli.recipe.stages import steps_before
from dpm_cli.run.accuracy_floor import AccuracyFloor
from dpm_cli.run.course import Course, CourseHooks
from dpm_cli.run.lives import is_due, watch_units
from dpm_cli.run.subject import Subject


class SparseLearning(CourseHooks):
    """Lets the base pruner add its penalty to the gradients, before any unit is chosen."""

    def __init__(self, course: Course, subject: Subject) -> None:
        super().__init__(course)
        self._base = subject.pruning.base

    def begin(self, loop: StageLoop) -> None:
        self._base.meet(loop.learner.optimizer)

    def before_step_(self) -> None:
        self._base.before_step_()

    def end_epoch(self, loop: StageLoop) -> Iterator[Event]:
        self._base.end_epoch()
        yield from ()


class PruningStage(CourseHooks):
    """Starts rounds when they are due, lets units decay or releases them, and removes dead ones."""

    def __init__(self, course: Course, subject: Subject, floor: AccuracyFloor) -> None:
        super().__init__(course)
        self.subject, self.floor = subject, floor
        steps_per_epoch = course.setup.steps_per_epoch
        self._first_step = steps_before(course.stages, course.current, steps_per_epoch)  # in steps of pruning stages

    @property
    def _pruning(self) -> Pruning:
        return self.subject.pruning

    def begin(self, loop: StageLoop) -> None:
        self._pruning.base.meet(loop.learner.optimizer)

    def begin_step(self, loop: StageLoop) -> Iterator[Event]:
        pruning = self._pruning
        if pruning.is_due(self._first_step + loop.step):
            self.require_agreement(f"the model before round {pruning.round + 1}")
            if self.floor.holds():
                self.floor.remember()
            elif pruning.goal.is_open:  # what was lost may come back: the rate falls as training goes on
                pruning.skip_round()
                yield Note(f"round {pruning.round + 1} waits at step {loop.step}: {self.floor.compare()}")
                return
            elif pruning.round:
                yield self.floor.go_back(f"round {pruning.round}", stage=loop.stage.name, step=loop.step)
                raise EndStage
            yield self._start_round(loop)
        if pruning.is_over:  # one-step pruning
            yield from self._remove(loop, pruning.finish_round)

    def before_step_(self) -> None:
        if not self._pruning.is_done:
            self._pruning.before_step_()

    def after_step_(self, step: int, lr: float) -> None:
        if not self._pruning.is_done:
            self._pruning.after_step_(self._first_step + step, lr)

    def end_step(self, loop: StageLoop) -> Iterator[Event]:
        if is_due(self._pruning, self._first_step + loop.step):
            yield watch_units(self._pruning, stage=loop.stage.name, step=loop.step)
        if self._pruning.is_over:
            yield from self._remove(loop, self._pruning.finish_round)

    def end_epoch(self, loop: StageLoop) -> Iterator[Event]:
        if self._pruning.has_dead:
            yield from self._remove(loop, self._pruning.remove_dead)
        self._pruning.base.end_epoch()

    def end(self, loop: StageLoop) -> Iterator[Event]:
        pruning = self._pruning
        if pruning.goal.is_open and self._is_last:
            yield from self._go_further(loop)
            return
        while not loop.learner.steps and pruning.is_due(0):  # without training, all units are cut at once
            if not (yield from self._cut_round(loop)).chosen:  # nothing is left to remove
                break
        if pruning.is_done and self.floor.holds():
            self.floor.remember()

    @property
    def _is_last(self) -> bool:
        """Tell whether nothing is pruned in later stages."""
        return not any(stage.prunes for stage in self.course.stages[self.course.stage + 1 :])

    def _go_further(self, loop: StageLoop) -> Iterator[Event]:
        """Cut rounds at once, after all training, until one breaks the floor: the state before it is delivered."""
        pruning, setup = self._pruning, self.course.setup
        while self.floor.holds():
            self.floor.remember()
            if pruning.is_met:
                return
            started = yield from self._cut_round(loop)
            while not started.chosen and started.limit > pruning.goal.limit:  # coarse widths are ahead of their rounds
                started = yield from self._cut_round(loop)
            if not started.chosen:
                return
            batches = self.subject.recipe.recalibrate_batches
            setup.recalibrate_(self.subject.model, self.course.unused_epoch, batches=batches)
        yield self.floor.go_back(f"round {pruning.round}", stage=loop.stage.name, step=loop.step)

    def _cut_round(self, loop: StageLoop) -> Generator[Event, None, RoundStarted]:
        """Cut the units of a round at once, without training."""
        started = self._start_round(loop)
        yield started
        self._pruning.decay.cut_()
        yield from self._remove(loop, self._pruning.finish_round)
        return started

    def _start_round(self, loop: StageLoop) -> RoundStarted:
        base, setup = self._pruning.base, self.course.setup
        if base.observes:
            batches = islice(setup.epoch_batches(self.course.unused_epoch), base.observes)
            loop.learner.show(batches, labelled=setup.splits.labelled, read=base.observe_)
        self.subject.settle_latency()
        choice = self._pruning.start_round()
        self.require_agreement(f"the victims of round {choice.round}")
        return RoundStarted(stage=loop.stage.name, step=loop.step, **asdict(choice))

    def _remove(self, loop: StageLoop, remove: Callable[[Example], Removal]) -> Iterator[Event]:
        """Remove dead units, at the end of a round or in the middle of a long one. Tell what had to stay whole."""
        loop.require_finite()  # otherwise the check of the outputs would blame the removal
        subject, pruning = self.subject, self._pruning
        removal = remove(self.course.setup.check_images())
        lay_out_(subject.model, subject.layout)
        loop.learner.shrink_(removal.before, removal.kept)
        self.require_agreement(f"what round {pruning.round} removed")
        subject.difference = max(subject.difference, removal.difference)
        subject.check_latency()
        yield from tell_removal(pruning, removal, stage=loop.stage.name, step=loop.step)

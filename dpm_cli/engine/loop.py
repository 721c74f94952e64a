"""Run the one training loop. `dpm train`, sparse learning, pruning and fine-tuning are stages of it."""

import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dpm_cli.data import Waiting
from dpm_cli.engine.learner import Learner
from dpm_cli.engine.setup import Setup
from dpm_cli.engine.step import LossMeter, LossReading, all_finite
from dpm_cli.errors import Interrupted, RunError
from dpm_cli.events import EpochEnded, Event, Note, StageBegan, StepTaken
from dpm_cli.recipe.stages import Stage

State = dict[str, Any]  # tensors, numbers and strings, for a checkpoint


class Hooks:
    """Adds to what a stage does besides training; the base adds nothing. `loop` is the calling loop."""

    def begin(self, loop: "StageLoop") -> None:
        """Called before the first step of a stage, or the first since it was resumed."""

    def begin_step(self, loop: "StageLoop") -> Iterator[Event]:
        """Called before a step. Raising EndStage ends the stage."""
        yield from ()

    def before_step_(self) -> None:
        """Called between backward and the optimizer's step."""

    def after_step_(self, step: int, lr: float) -> None:
        """Called after the optimizer's step, unless that was skipped."""

    def end_step(self, loop: "StageLoop") -> Iterator[Event]:
        """Called after a step."""
        yield from ()

    def end_epoch(self, loop: "StageLoop") -> Iterator[Event]:
        """Called at the end of an epoch, before the model is evaluated."""
        yield from ()

    def require_agreement(self, what: str) -> None:
        """Check that all processes computed the same. Raises RunError."""

    def tell_notes(self) -> Iterator[Event]:
        """Called after every epoch, to tell the user what has come up."""
        yield from ()

    def save(self, loop: "StageLoop", in_stage: State) -> Iterator[Event]:
        """Write a checkpoint. in_stage: state that is only needed until the stage is over."""
        yield from ()

    def end(self, loop: "StageLoop") -> Iterator[Event]:
        """Called after the last step."""
        yield from ()


class EndStage(Exception):
    """Raised by a hook to end the stage before its last step."""


class StageLoop:
    """Runs one stage."""

    def __init__(self, setup: Setup, learner: Learner, stage: Stage, hooks: Hooks, step: int = 0) -> None:
        """step: the next one to take, within the stage."""
        self.setup, self.learner, self.stage, self.hooks, self.step = setup, learner, stage, hooks, step
        self.seconds = 0.0  # up to the last checkpoint or end, since they were last added to those of the run
        self._meter, self._waiting = LossMeter(setup.device), Waiting()
        self._epoch_started = self._counted = time.monotonic()

    @property
    def model(self) -> nn.Module:
        return self.learner.model

    def run(self) -> Iterator[Event]:
        """Take all remaining steps, and yield events. Raises Interrupted when the user wants to stop."""
        stage, hooks = self.stage, self.hooks
        self.model.train()
        yield StageBegan(stage.name)
        hooks.begin(self)
        batches = self.setup.stage_batches(stage.first_epoch, stage.training.epochs, self.step)
        try:
            for images, labels in self._waiting.timed(batches):
                yield from self._take_step(images, labels)
                stopping = self.setup.world.largest(self.setup.should_stop())
                is_due = self.step % self.setup.checkpoint_every == 0
                if stopping or (is_due and self.step < self.learner.steps):
                    yield from self._save()
                if stopping:
                    raise Interrupted(
                        f"stopped in stage {stage.name} at step {self.step}; continue with --resume",
                        stopping if stopping > 1 else Interrupted.exit_code,
                    )
        except EndStage:
            pass
        yield from hooks.end(self)
        self._count_seconds()

    def _take_step(self, images: Tensor, labels: Tensor) -> Iterator[Event]:
        hooks, learner, step, per_epoch = self.hooks, self.learner, self.step, self.setup.steps_per_epoch
        (count,) = self.setup.world.sum(len(labels))
        yield from hooks.begin_step(self)
        lr = learner.learning_rate(step)
        loss = learner.step_(
            images,
            labels,
            step=step,
            count=count,
            before=[hooks.before_step_],
            after=[lambda: hooks.after_step_(step, lr)],
        )
        self._meter.add_(loss, images=int(count), step=step)
        while learner.notes:
            yield Note(learner.notes.pop(0))
        self.step += 1
        yield from hooks.end_step(self)
        yield StepTaken(
            stage=self.stage.name,
            step=self.step,
            steps=learner.steps,
            epoch=step // per_epoch + 1,
            epochs=learner.steps // per_epoch,
        )
        if self.step % per_epoch == 0:
            yield from hooks.end_epoch(self)
            yield self._end_epoch()
            yield from hooks.tell_notes()
            self._epoch_started = time.monotonic()

    def _end_epoch(self) -> EpochEnded:
        seconds, waited = time.monotonic() - self._epoch_started, self._waiting.take()
        reading = self.require_finite()
        self.hooks.require_agreement(f"the model after step {self.step}")
        self._meter.reset_()
        return EpochEnded(
            stage=self.stage.name,
            epoch=self.step // self.setup.steps_per_epoch,
            epochs=self.stage.training.epochs,
            step=self.step,
            loss=reading.mean,
            validation_accuracy=self.setup.validate(self.model),
            lr=self.learner.learning_rate(self.step - 1),
            images_per_second=reading.images / max(seconds, 1e-9),
            waiting_for_data=min(waited / max(seconds, 1e-9), 1.0),
            seconds=seconds,
        )

    def require_finite(self) -> LossReading:
        """Check losses and weights before a checkpoint or removal, which cannot be undone. Raises RunError."""
        reading = self._meter.read()
        bad = reading.first_bad_step
        if bad is None and all_finite(self.learner.tensors()):
            return reading
        place = f"at step {bad}" if bad is not None else f"before step {self.step}"
        last, section = self.setup.checkpoint, self.stage.settings.partition(".")[0]
        kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
        clip_grad = f"{'train' if section == 'prune' else section}.clip_grad"
        raise RunError(
            f"the loss or a weight is not finite in stage {self.stage.name} {place}: lower {self.stage.settings}lr or "
            f"set {clip_grad}; {kept}"
        )

    def _save(self) -> Iterator[Event]:
        self.require_finite()
        self._count_seconds()
        yield from self.hooks.save(
            self,
            {
                "optimizer": self.learner.state_dict(),
                "meter": self._meter.state_dict(),
                "epoch_seconds": self._counted - self._epoch_started,
                "waited_seconds": self._waiting.seconds,
            },
        )

    def load_state_dict(self, in_stage: State) -> None:
        """Continue from the state that `Hooks.save` was given."""
        self.learner.load_state_dict(in_stage["optimizer"])
        self._meter.load_state_dict(in_stage["meter"])
        self._epoch_started -= float(in_stage["epoch_seconds"])
        self._waiting.seconds = float(in_stage["waited_seconds"])

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.seconds, self._counted = self.seconds + now - self._counted, now

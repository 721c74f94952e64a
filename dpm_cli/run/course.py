"""Run stages one after the other, as `dpm train`, `dpm prune` and On-the-Fly all do.

A course tracks its position, saves it with all changing parts in checkpoints, and resumes from them.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from dpm_cli.engine.allocator import keeping_freed_memory
from dpm_cli.engine.backends import tuned_backends
from dpm_cli.engine.checkpoint import capture_rng, load_checkpoint, remove_checkpoints, restore_rng, save_checkpoint
from dpm_cli.engine.learner import Learner
from dpm_cli.engine.loop import Hooks, StageLoop, State
from dpm_cli.engine.setup import Setup
from dpm_cli.events import CheckpointWritten, Costs, Event, Note, Resumed, StagePlan, Started, Wanted
from dpm_cli.graph import Groups
from dpm_cli.recipe.stages import Stage
from dpm_cli.run.journal import Journal
from dpm_cli.run.resume import Origin, foreign_state

T = TypeVar("T")


class Part(Protocol):
    """Is anything that training changes and a checkpoint must hold."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class Trainee(Part, Protocol):
    """Holds the trained model, and all state that must be the same in every process."""

    model: nn.Module
    layout: torch.memory_format
    teacher: nn.Module | None


class Course:
    """Runs all stages of one run. `stage` and `step` locate the next step."""

    def __init__(
        self,
        setup: Setup,
        stages: Sequence[Stage],
        trainee: Trainee,
        origin: Origin,
        journal: Journal,
        more: Mapping[str, Part] | None = None,
    ) -> None:
        """more: further parts that a checkpoint must hold, by name."""
        self.setup, self.stages, self.trainee, self.origin, self.journal = setup, stages, trainee, origin, journal
        self.parts: dict[str, Part] = {"trainee": trainee, **(more or {})}
        self.stage = self.step = 0
        self.before = 0  # steps of the stages that are over; some are repeated, some end early
        self.seconds: dict[str, float] = {}  # by stage
        self.notes: list[str] = []
        self._in_stage: State | None = None  # from a checkpoint, until its stage resumes
        self._told = 0  # number of skipped images already reported
        self._noted = 0  # number of notes already reported

    @property
    def is_over(self) -> bool:
        return self.stage >= len(self.stages)

    @property
    def current(self) -> Stage:
        """Return the stage in progress or the next one; at the end, the last one."""
        return self.stages[min(self.stage, len(self.stages) - 1)]

    @property
    def unused_epoch(self) -> int:
        """Return an epoch number that no stage uses, for drawing images to compute statistics."""
        return sum(stage.training.epochs for stage in self.stages)

    def describe_start(self, arch: str | None, groups: Groups, target: Wanted, *, round_to: int) -> Started:
        """Make the first event of a pruning run. arch: as `Run` is given. groups: of the dense model."""
        setup, cost, alive = self.setup, groups.cost, np.ones(groups.units, bool)
        return Started(
            arch=arch,
            device=str(setup.device),
            precision=setup.precision.name,
            stages=tuple(
                StagePlan(stage.name, stage.training.epochs, stage.training.epochs * setup.steps_per_epoch)
                for stage in self.stages
            ),
            round_to=round_to,
            target=target,
            dense=Costs(cost.macs(alive), cost.parameters(alive), groups.units),
        )

    def carry_out(
        self,
        train: Generator[Event, None, None],
        finish: Generator[Event, None, T],
        *,
        resume: bool,
        prepare: Callable[[], Iterable[str]],
    ) -> Generator[Event, None, T]:
        """Do a whole run, log its events, and return what `finish` returns. Its checkpoints are then removed.

        prepare: called before anything is resumed, while the model is as it was given; gives notes for the user.
        """
        self.setup.world.require_same("the recipe, the model file or the data", self.origin.to_dict())
        self.notes += prepare()
        yield from self.tell_new_notes()
        if resume:
            yield from self.restore()
        yield from self.tell_corrupt()
        with self.journal.opened():
            with (
                keeping_freed_memory(),
                tuned_backends(self.setup.device, self.setup.engine),
            ):  # not while measuring latency, as deployed processes do not do this
                yield from self.journal.follow(train)
            result = yield from self.journal.follow(finish)
        self.forget()
        return result

    def train(self, hooks: Hooks) -> Iterator[Event]:
        """Train for the rest of the current stage."""
        setup, stage = self.setup, self.current
        learner = Learner(
            self.trainee.model,
            stage.training,
            precision=setup.precision,
            steps_per_epoch=setup.steps_per_epoch,
            seed=setup.seed * 1_000_003 + stage.first_epoch,
            layout=self.trainee.layout,
            teacher=self.trainee.teacher,
            world=setup.world,
            engine=setup.engine,
        )
        loop = StageLoop(setup, learner, stage, hooks, self.step)
        if self._in_stage:
            with foreign_state(setup.checkpoint):
                loop.load_state_dict(self._in_stage)
            self._in_stage = None
        yield from loop.run()
        self.step = loop.step
        self._add_seconds(loop)

    def advance(self) -> Iterator[Event]:
        """Move to the next stage and save a checkpoint."""
        self.stage, self.step, self.before = self.stage + 1, 0, self.before + self.step
        yield self.save()

    def save(self, loop: StageLoop | None = None, in_stage: State | None = None) -> CheckpointWritten:
        """Write a checkpoint. loop, in_stage: state that is only needed until the current stage is over."""
        if loop:
            self.step = loop.step
            self._add_seconds(loop)
        self.require_agreement(f"the model after step {self.step}")
        setup = self.setup
        if setup.world.is_main:
            scaler = setup.precision.scaler
            state = self.origin.to_dict() | {
                "stage": self.stage,
                "step": self.step,
                "before": self.before,
                "seconds": self.seconds,
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
                "in_stage": in_stage,
                "scaler": scaler.state_dict() if scaler else None,
                "rng": capture_rng(),
                "metrics_bytes": self.journal.flush_to_disk(),
            }
            save_checkpoint(setup.checkpoint, state)
        return CheckpointWritten(step=self.step, path=str(setup.checkpoint))

    def restore(self) -> Iterator[Event]:
        """Resume from the last intact checkpoint, if any. Raises OutputError if it belongs to another run."""
        setup = self.setup
        checkpoint = setup.world.share(load_checkpoint(setup.checkpoint) if setup.world.is_main else None)
        if checkpoint is None:
            yield Note(f"{setup.checkpoint.parent} holds no checkpoint: the run starts at its beginning")
            return
        self.origin.require_same(checkpoint.state, checkpoint.path)
        with foreign_state(checkpoint.path):
            self._restore_state(checkpoint.state)
        self.notes += [f"{path} was damaged; the one before it was used" for path in checkpoint.damaged]
        stage = "export" if self.is_over else self.current.name
        yield Resumed(stage=stage, step=self.step, path=str(checkpoint.path), before=self.before)

    def _restore_state(self, state: State) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.seconds = {str(name): float(spent) for name, spent in state["seconds"].items()}
        self.stage, self.step, self.before = (int(state[name]) for name in ("stage", "step", "before"))
        if not (0 <= self.stage <= len(self.stages) and self.step >= 0):
            raise ValueError(f"stage {self.stage}, step {self.step}")
        self._in_stage = state["in_stage"]
        scaler = self.setup.precision.scaler
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        restore_rng(state["rng"])
        self.journal.bytes = max(0, int(state["metrics_bytes"]))

    def forget(self) -> None:
        """Remove the checkpoints of a finished run."""
        if self.setup.world.is_main:
            remove_checkpoints(self.setup.checkpoint)

    def require_agreement(self, what: str) -> None:
        """Check that all processes hold the same state. Raises RunError if they do not."""
        self.setup.world.share_buffers_(self.trainee.model)
        self.setup.world.require_same(what, self.trainee.state_dict())

    def tell_corrupt(self) -> Iterator[Event]:
        """Report images that were skipped since the last call; streaming finds them during training."""
        corrupt = self.setup.splits.corrupt
        for paths in self.setup.world.gather(corrupt.paths):
            corrupt.adopt_(paths)
        if len(corrupt) > self._told:
            self._told = len(corrupt)
            yield Note(corrupt.note)

    def tell_new_notes(self) -> Iterator[Event]:
        """Report the notes that were added since the last call."""
        new, self._noted = self.notes[self._noted :], len(self.notes)
        yield from map(Note, new)

    def _add_seconds(self, loop: StageLoop) -> None:
        name = loop.stage.name
        self.seconds[name] = self.seconds.get(name, 0.0) + loop.seconds
        loop.seconds = 0.0


class CourseHooks(Hooks):
    """Saves checkpoints, compares processes and reports skipped images in every stage of a course."""

    def __init__(self, course: Course) -> None:
        self.course = course

    def require_agreement(self, what: str) -> None:
        self.course.require_agreement(what)

    def tell_notes(self) -> Iterator[Event]:
        yield from self.course.tell_corrupt()

    def save(self, loop: StageLoop, in_stage: State) -> Iterator[Event]:
        yield self.course.save(loop, in_stage)

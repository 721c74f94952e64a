"""The story of a run: train while units decay and die, remove them, fine-tune, save, export, report."""

import contextlib
import copy
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dpm_cli.data import Augmentation, Splits, Waiting
from dpm_cli.engine.allocator import keeping_freed_memory
from dpm_cli.engine.batchnorm import recalibrate_batchnorm_
from dpm_cli.engine.checkpoint import capture_rng, load_checkpoint, remove_checkpoints, restore_rng, save_checkpoint
from dpm_cli.engine.digest import digest
from dpm_cli.engine.distributed import ALONE, World
from dpm_cli.engine.evaluate import evaluate_module
from dpm_cli.engine.learner import Learner
from dpm_cli.engine.precision import Precision, choose_layout
from dpm_cli.engine.step import LossMeter, LossReading, all_finite
from dpm_cli.errors import AccuracyError, Interrupted, OutputError, RecipeError, RunError, TargetError, one_line
from dpm_cli.files import CHECKPOINT
from dpm_cli.graph import Groups, take
from dpm_cli.graph.folding import fold_means_
from dpm_cli.graph.labels import Flags
from dpm_cli.method.budget import resolve_limit
from dpm_cli.method.pruners import OnTheFly, make_base
from dpm_cli.method.pruning import Pruning, Removal
from dpm_cli.method.rectify import Rectifier
from dpm_cli.method.rounds import plan as plan_rounds
from dpm_cli.method.stages import Stage, plan_stages
from dpm_cli.method.survey import survey
from dpm_cli.recipe import Recipe, dump_recipe
from dpm_cli.report import Event, Report
from dpm_cli.run.accuracy_floor import Floor
from dpm_cli.run.delivery import Delivery
from dpm_cli.run.events import Metrics, Unwritten, epoch_event, step_event
from dpm_cli.sparse.cut import CutModel, cut_model

Events = Generator[Event, None, None]
CHECK_IMAGES = 8  # real inputs on which outputs before and after compaction are compared


@dataclass
class Progress:
    """Where a run stands, and what it has seen."""

    stage: int = 0
    step: int = 0  # within the stage; the next one to take
    difference: float = 0.0  # the largest at any compaction
    seconds: dict[str, float] = field(default_factory=dict)


class Run:
    """One pruning run. `events()` does the work and yields what happens; `report` is there when it is exhausted."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        splits: Splits,
        *,
        arch: str | None,
        output: Path,
        device: torch.device,
        precision: Precision,
        should_stop: Callable[[], int] = lambda: False,
        world: World = ALONE,
    ) -> None:
        """model: dense (or slim from an earlier run), in eval mode on the CPU. It is copied, not changed.

        should_stop: true, or the exit code to stop with. world: each of its processes has such a run.
        Raises UnsupportedModelError, RecipeError or TargetError before any training.
        """
        self.recipe, self.splits, self.arch, self.output = recipe, splits, arch, output
        self.device, self.precision, self.should_stop, self.world = device, precision, should_stop, world
        self.train_split, self.validation_split = world.slice(splits.train), world.slice(splits.validation)
        self.dense = model
        self.stages = plan_stages(recipe)
        self.steps_per_epoch = max(1, len(splits.train) // recipe.data.batch)
        self.progress = Progress()
        self._restored: dict[str, Any] | None = None  # a checkpoint's `in_stage`, until its stage goes on
        self.notes: list[str] = []
        self.report: Report
        self._corrupt_told = 0
        torch.manual_seed(recipe.seed)
        if world.size > min(recipe.data.batch, len(splits.train)):
            raise RecipeError(
                f"data.batch is {recipe.data.batch}, less than an image for each of {world.size} processes"
            )

        found = survey(model, recipe)
        self.dense_groups, self.round_to, self.floors = found.groups, found.round_to, found.floors
        self._start, self._shifts = found.module, found.shifts
        self.layout = choose_layout(self._start, torch.zeros(2, *recipe.model.input))
        if recipe.prune.round_to == "auto" and not recipe.cuts_weights:
            self.notes.append(f"prune.round_to is auto: widths are multiples of {self.round_to}")
        self.floor: Floor | None = None  # of the accuracy, once the dense model was measured
        self._begin_dense()
        self.teacher = None
        if any(stage.training.distill for stage in self.stages):
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)

    def _begin_dense(self) -> None:
        """The model as it was given, and all of its pruning still to come."""
        self.model = copy.deepcopy(self._start).to(self.device).to(memory_format=self.layout)
        self.pruning = self._plan_pruning()

    def _restore_model(self, pruning: dict[str, Any], weights: dict[str, Any]) -> None:
        """An earlier state of a model that is dense now."""
        self.pruning.load_state_dict(pruning)
        self.model.to(memory_format=self.layout)
        self.model.load_state_dict(weights)

    def _plan_pruning(self) -> Pruning:
        prune, decay = self.recipe.prune, self.recipe.decay
        groups, floors, base = self.dense_groups, self.floors, make_base(self.recipe)
        if self.recipe.cuts_weights:  # all units stay, so nothing is due and the target is met
            everything = groups.cost.parameters(np.ones(groups.units, bool))
            limits: dict[str, Any] = {"kind": "params", "limit": everything, "floors": floors}
            return Pruning(self.model, groups, base, **limits, starts=(), end=0, decay_steps=1)
        rounds = plan_rounds(self.recipe, self.stages, base, steps_per_epoch=self.steps_per_epoch)
        trains = any(stage.prunes and stage.training.epochs for stage in self.stages)
        rectify = decay.rectify if trains else None
        return Pruning(
            self.model,
            groups,
            base,
            kind=prune.target.kind,
            limit=resolve_limit(groups, floors, kind=prune.target.kind, amount=prune.target.amount),
            floors=floors,
            starts=rounds.starts,
            end=rounds.end,
            decay_steps=decay.steps if trains else 1,
            envelope=decay.envelope,
            make_rectifier=partial(Rectifier, **rectify.model_dump()) if rectify else None,
            fold_means=self._fold_means if self.recipe.folds_means else None,
        )

    # ------------------------------------------------------------------------------------------------ the story

    def events(self, *, resume: bool = False) -> Events:
        yield self._started()
        self.world.require_same("the recipe, the model file or the data", self._origin)
        self._measure_floor()
        if resume:
            yield from self._restore()
        yield from self._tell_corrupt()
        with self._open_metrics() as self.metrics:
            with keeping_freed_memory():  # not while latency is measured: nobody else's process does that
                yield from self._train_and_prune()
            yield from self._finish()
        if self.world.is_main:
            remove_checkpoints(self.output)
        for note in self.notes:
            yield {"event": "note", "text": note}
        yield {"event": "done"}
        if self.report.floor and self.report.floor.is_broken:
            raise AccuracyError(self.report.floor.text or "", report=self.report)

    def _train_and_prune(self) -> Events:
        """All stages, and those after pruning once more where the accuracy floor demands it."""
        yield from self._train_stages()
        while not self._holds_floor():
            is_final = self._went_back or self._held_the_target
            yield self._go_back("fine-tuning" if is_final else f"round {self.pruning.round}")
            if is_final:  # fine-tuning from here did not help
                break
            self.progress.stage = self._stage_after_pruning
            yield self._save_checkpoint(None)
            yield from self._train_stages()

    def _train_stages(self) -> Events:
        """What is left of the stages; then the BatchNorm statistics are settled."""
        while self.progress.stage < len(self.stages):
            stage = self.stages[self.progress.stage]
            is_over = self.pruning.is_done or self._went_back
            if self.progress.step or not (stage.ends_with_pruning and is_over):
                yield from self._train(stage)
            self.progress.stage, self.progress.step = self.progress.stage + 1, 0
            if self.progress.stage >= self._stage_after_pruning:
                self.pruning.restore_()
            yield self._save_checkpoint(None)
        self.pruning.restore_()
        if not self.pruning.is_done and not self._went_back:
            raise TargetError(
                f"target {self.pruning.kind} <= {self.pruning.limit:,} was not met: {self.pruning.cost():,} is left"
            )
        self._recalibrate_(self.model)

    def _train(self, stage: Stage) -> Events:
        if stage.name != "finetune":
            self.pruning.base.enter(stage.name, self.model, self.progress.step)
        learner, meter = self._make_learner(stage), LossMeter(self.device)
        pruning = self.pruning if stage.prunes else None
        first_step = self._steps_before(stage)
        before = [self.pruning.base.before_step_] if stage.name == "sparse" else []
        yield {"event": "stage", "name": stage.name}
        waiting = Waiting()
        started = epoch_started = time.monotonic()
        if self._restored:
            with _foreign_state(self.output / CHECKPOINT):
                learner.load_state_dict(self._restored["optimizer"])
                meter.load_state_dict(self._restored["meter"])
                epoch_started -= float(self._restored["epoch_seconds"])
                waiting.seconds = float(self._restored["waited_seconds"])
            self._restored = None
        for images, labels in waiting.timed(self._batches(stage)):
            step = self.progress.step
            (count,) = self.world.sum(len(labels))
            if pruning and pruning.is_due(first_step + step):
                self._require_agreement(f"the model before round {pruning.round + 1}")
                if self._holds_floor():
                    self._remember_state()
                elif pruning.round:
                    yield self._go_back(f"round {pruning.round}")
                    break
                chosen = pruning.start_round()
                self._require_agreement(f"the victims of round {pruning.round}")
                yield self.metrics.write({"event": "round", "stage": stage.name, "step": step} | chosen)
            if pruning and pruning.is_over:  # one-step pruning
                yield self._remove(pruning.finish_round, stage, learner, meter)
            loss = learner.step_(
                images,
                labels,
                step=step,
                count=count,
                before=[pruning.before_step_] if pruning and not pruning.is_done else before,
                after=[partial(pruning.after_step_, first_step + step, learner.learning_rate(step))]
                if pruning and not pruning.is_done
                else (),
            )
            meter.add_(loss, images=int(count), step=step)
            self.progress.step = step = step + 1
            if pruning and pruning.is_over:
                yield self._remove(pruning.finish_round, stage, learner, meter)
            yield step_event(stage=stage.name, step=step, steps=learner.steps, steps_per_epoch=self.steps_per_epoch)
            if step % self.steps_per_epoch == 0:
                if pruning and pruning.has_dead:
                    yield self._remove(pruning.remove_dead, stage, learner, meter)
                if stage.name != "finetune":
                    self.pruning.base.end_epoch()
                yield self._end_epoch(stage, learner, meter, time.monotonic() - epoch_started, waiting.take())
                yield from self._tell_corrupt()
                epoch_started = time.monotonic()
            stopping = self.world.largest(self.should_stop())
            if stopping or (step % self.recipe.checkpoint.every == 0 and step < learner.steps):
                self._require_finite(meter, stage, learner)
                self._count_seconds(stage, started)
                started = time.monotonic()
                yield self._save_checkpoint(
                    {
                        "optimizer": learner.state_dict(),
                        "meter": meter.state_dict(),
                        "epoch_seconds": started - epoch_started,
                        "waited_seconds": waiting.seconds,
                    }
                )
            if stopping:
                text = f"stopped in stage {stage.name} at step {step}; continue with --resume"
                raise Interrupted(text, stopping if stopping > 1 else Interrupted.exit_code)
        if pruning and not learner.steps and pruning.is_due(0):  # no training: all units are cut at once
            yield self.metrics.write({"event": "round", "stage": stage.name, "step": 0} | pruning.start_round())
            yield self._remove(pruning.finish_round, stage, learner, meter)
        if pruning and pruning.is_done and self._holds_floor():
            self._remember_state()
        self._count_seconds(stage, started)

    def _fold_means(self, groups: Groups, alive: Flags) -> None:
        """Before units are cut at once: what they gave on average goes into the layers that read them."""
        batches = islice(self._calibration_batches(), self.recipe.compact.fold_batches)
        left = fold_means_(self.model, groups, alive, (images for images, _ in batches), self._shifts)
        if left:
            shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            self.notes.append(f"no means were folded into {shown}, whose weights are used by other code than their own")

    def _remove(self, remove: Callable[[Tensor], Removal], stage: Stage, learner: Learner, meter: LossMeter) -> Event:
        """The dead units, at the end of a round or in the middle of a long one."""
        self._require_finite(meter, stage, learner)  # or the check of the outputs would blame the removal
        learner.remember()
        removal = remove(self._check_images())
        self.model.to(memory_format=self.layout)
        learner.shrink_(lambda name, value: take(value, removal.kept.get(name, {})))
        self._require_agreement(f"what round {self.pruning.round} removed")
        self.progress.difference = max(self.progress.difference, removal.difference)
        groups = self.pruning.groups
        alive = self.pruning.all_alive
        return self.metrics.write(
            {
                "event": "compact",
                "stage": stage.name,
                "round": self.pruning.round,
                "step": self.progress.step,
                "removed": removal.removed,
                "released": removal.released,
                "macs": groups.cost.macs(alive),
                "params": groups.cost.parameters(alive),
                "units": groups.units,
                "difference": removal.difference,
            }
        )

    def _end_epoch(self, stage: Stage, learner: Learner, meter: LossMeter, seconds: float, waited: float) -> Event:
        reading = self._require_finite(meter, stage, learner)
        self._require_agreement(f"the model after step {self.progress.step}")
        meter.reset_()
        return self.metrics.write(
            epoch_event(
                stage=stage.name,
                epoch=self.progress.step // self.steps_per_epoch,
                epochs=stage.training.epochs,
                step=self.progress.step,
                loss=reading.mean,
                validation_accuracy=self._validate(),
                lr=learner.learning_rate(self.progress.step - 1),
                images=reading.images,
                seconds=seconds,
                waited=waited,
            )
        )

    def _finish(self) -> Events:
        """The model is slim and trained: export, measure, report, save."""
        cuts = []
        if self.recipe.cuts_weights:
            for cut in self._cut_weights():
                cuts.append(cut)
                yield self.metrics.write({"event": "cut"} | asdict(cut.report))
            self.model = cuts[0].module
        validation_accuracy = self._validate()
        if self.world.is_main:
            yield from self._deliver(validation_accuracy, cuts)
        self.report = cast(Report, self.world.share(self.report if self.world.is_main else None))

    def _deliver(self, validation_accuracy: float | None, cuts: Sequence[CutModel]) -> Events:
        slim = copy.deepcopy(self.model).cpu().to(memory_format=torch.contiguous_format).eval()
        delivery = Delivery(
            self.recipe,
            self.splits,
            arch=self.arch,
            output=self.output,
            device=self.device,
            layout=self.layout,
            dense=self.dense,
            groups=self.dense_groups,
            image=self._check_images()[:1].cpu(),
        )
        seconds, started = self.progress.seconds, time.monotonic()
        exports = []
        for made in delivery.export(slim):
            exports.append(made)
            place = {"format": made.format, "path": made.path}
            yield self.metrics.write({"event": "export"} | place | {"max_difference": made.max_difference})
        seconds["export"] = time.monotonic() - started
        yield {"event": "measure", "what": "accuracy and latency of the dense and the slim model"}
        started = time.monotonic()
        measured = delivery.measure(slim, exports)
        seconds["measure"] = time.monotonic() - started
        self.report = delivery.make_report(
            measured,
            self.pruning,
            exports,
            difference=self.progress.difference,
            seconds=seconds,
            precision=self.precision.name,
            validation_accuracy=validation_accuracy,
            floor=self.floor,
            notes=self.notes,
            cuts=cuts,
        )
        delivery.save(slim, self.report, cuts)

    def _cut_weights(self) -> Iterator[CutModel]:
        """The trained model, cut to every sparsity that the recipe names."""
        settings, base = self.recipe.prune.on_the_fly, self.pruning.base
        assert isinstance(base, OnTheFly)
        sparsities = self.recipe.prune.target.sparsity or ()
        for number, sparsity in enumerate(sparsities if settings.threshold is None else sparsities[:1]):
            yield cut_model(
                self.model,
                base.layers,
                sparsity=sparsity,
                threshold=settings.threshold,
                how=settings.recover,
                per=settings.per,
                recalibrate_=self._recalibrate_ if self.recipe.recalibrate_batches else None,
                score=self._test,
                file=str(self.output / (f"slim-{sparsity:g}.pt" if number else "slim.pt")),
            )

    def _test(self, model: nn.Module) -> float | None:
        """Accuracy on the test set: to be reported, never to decide."""
        if not self.splits.labelled:
            return None
        return evaluate_module(model, self.splits.test, batch=self.recipe.data.batch).accuracy

    # --------------------------------------------------------------------------------------- the accuracy floor

    def _measure_floor(self) -> None:
        if self.recipe.prune.max_drop is not None:
            accuracy = self._validate()
            assert accuracy is not None  # a recipe with a floor has validation images
            self.floor = Floor(self.recipe.prune.max_drop, accuracy)

    def _holds_floor(self) -> bool:
        accuracy = self._validate() if self.floor else None
        return self.floor is None or accuracy is None or self.floor.holds(accuracy)

    @property
    def _went_back(self) -> bool:
        return self.floor is not None and self.floor.broken is not None

    @property
    def _held_the_target(self) -> bool:
        """Whether the state to go back to is one in which all pruning was done."""
        return self.floor is not None and self.floor.held is not None and self.floor.held["is_done"]

    def _remember_state(self) -> None:
        """As the last one that held the floor: the model and its structure."""
        if self.floor:
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.model.state_dict().items()}
            pruning = copy.deepcopy(self.pruning.state_dict())
            self.floor.held = {"model": weights, "pruning": pruning, "is_done": self.pruning.is_done}

    def _go_back(self, culprit: str) -> Event:
        """To the last state that held the floor, for good: nothing is pruned any more."""
        assert self.floor is not None
        accuracy, floor, held = self._validate(), self.floor, self.floor.held
        self._begin_dense()
        if held:
            self._restore_model(copy.deepcopy(held["pruning"]), held["model"])
        pruning = self.pruning
        pruning.restore_()
        if not floor.broken:
            floor.broken = (
                f"{culprit} broke the accuracy floor and did not recover: validation {accuracy:.2f} %, floor "
                f"{floor.limit:.2f} % ({floor.max_drop:g} points below the dense model); the run went back to the last "
                f"state that held, with {pruning.kind} {pruning.cost():,} (target {pruning.limit:,})"
            )
        return self.metrics.write(
            {
                "event": "back",
                "stage": self.stages[min(self.progress.stage, len(self.stages) - 1)].name,
                "step": self.progress.step,
                "culprit": culprit,
                "validation_accuracy": accuracy,
                "floor": floor.limit,
                "macs": pruning.groups.cost.macs(pruning.all_alive),
                "params": pruning.groups.cost.parameters(pruning.all_alive),
                "units": pruning.groups.units,
            }
        )

    @property
    def _stage_after_pruning(self) -> int:
        stages = (index for index, stage in enumerate(self.stages, 1) if stage.prunes)
        return max(stages, default=len(self.stages))

    # --------------------------------------------------------------------------------------------------- pieces

    def _started(self) -> Event:
        self._metrics_bytes = 0
        alive = self.pruning.all_alive
        return {
            "event": "start",
            "arch": self.arch,
            "device": str(self.device),
            "precision": self.precision.name,
            "stages": [
                {"name": s.name, "epochs": s.training.epochs, "steps": s.training.epochs * self.steps_per_epoch}
                for s in self.stages
            ],
            "round_to": self.round_to,
            "target": {"kind": "sparsity", "asked": list(self.recipe.prune.target.sparsity)}
            if self.recipe.prune.target.sparsity
            else {"kind": self.pruning.kind, "limit": self.pruning.limit, "dense": self.pruning.dense_cost},
            "dense": {
                "macs": self.dense_groups.cost.macs(alive),
                "params": self.dense_groups.cost.parameters(alive),
                "channels": self.dense_groups.units,
            },
        }

    def _open_metrics(self) -> Metrics:
        return Metrics(self.output / "metrics.jsonl", self._metrics_bytes) if self.world.is_main else Unwritten()

    def _tell_corrupt(self) -> Events:
        """If images were left out since the last call; streamed ones are found on the way."""
        for paths in self.world.gather(self.splits.corrupt.paths):
            self.splits.corrupt.adopt_(paths)
        if len(self.splits.corrupt) > self._corrupt_told:
            self._corrupt_told = len(self.splits.corrupt)
            yield {"event": "note", "text": self.splits.corrupt.note}

    def _make_learner(self, stage: Stage) -> Learner:
        learner = Learner(
            self.model,
            precision=self.precision,
            steps=stage.training.epochs * self.steps_per_epoch,
            steps_per_epoch=self.steps_per_epoch,
            seed=self.recipe.seed * 1_000_003 + stage.first_epoch,
            layout=self.layout,
            teacher=self.teacher,
            world=self.world,
            **stage.training.model_dump(exclude={"epochs"}),
        )
        self.model.train()
        return learner

    def _steps_before(self, stage: Stage) -> int:
        """Steps of the stages that prune, before this one."""
        earlier = [other for other in self.stages if other.prunes and other.first_epoch < stage.first_epoch]
        return sum(other.training.epochs for other in earlier) * self.steps_per_epoch

    def _batches(self, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of a stage's training batches, from the step the run stands at."""
        per_epoch = self.steps_per_epoch
        for epoch in range(self.progress.step // per_epoch, stage.training.epochs):
            yield from self._epoch_batches(stage.first_epoch + epoch, start=self.progress.step - epoch * per_epoch)

    def _epoch_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches only, unless the images do not fill one. epoch: over the whole run."""
        train, batch, recipe = self.train_split, self.recipe.data.batch, self.recipe
        return train.batches(
            batch,
            seed=recipe.seed,
            epoch=epoch,
            augment=augmentation(recipe),
            start=start,
            drop_last=len(train) >= batch,
        )

    def _calibration_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Training images of an epoch that no stage has."""
        return self._epoch_batches(sum(stage.training.epochs for stage in self.stages))

    def _recalibrate_(self, model: nn.Module) -> None:
        count = self.recipe.recalibrate_batches
        batches = self._calibration_batches()
        recalibrate_batchnorm_(model, batches, count=count, precision=self.precision, world=self.world)

    def _validate(self) -> float | None:
        if not (self.splits.labelled and len(self.validation_split)):
            return None
        score = evaluate_module(
            self.model,
            self.validation_split,
            batch=self.recipe.data.batch,
            precision=self.precision,
            world=self.world,
        )
        return score.accuracy

    def _require_agreement(self, what: str) -> None:
        """Several processes must decide alike. Raises RunError if they do not."""
        self.world.share_buffers_(self.model)
        self.world.require_same(what, [self.model.state_dict(), self.pruning.state_dict()])

    def _check_images(self) -> Tensor:
        held_out = self.splits.validation if len(self.splits.validation) else self.splits.train
        images, _ = next(held_out.batches(CHECK_IMAGES, seed=0, epoch=0, augment=None))
        return images

    def _require_finite(self, meter: LossMeter, stage: Stage, learner: Learner) -> LossReading:
        """Call before every checkpoint, which must not hold what cannot be continued from."""
        reading = meter.read()
        bad = reading.first_bad_step
        if bad is None and all_finite(learner.tensors()):
            return reading
        place = f"at step {bad}" if bad is not None else f"before step {self.progress.step}"
        last = self.output / CHECKPOINT
        kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
        clip_grad = "finetune.clip_grad" if stage.name == "finetune" else "train.clip_grad"
        raise RunError(
            f"the loss or a weight is not finite in stage {stage.name} {place}: lower {stage.settings}lr or set "
            f"{clip_grad}; {kept}"
        )

    def _count_seconds(self, stage: Stage, started: float) -> None:
        seconds = self.progress.seconds
        seconds[stage.name] = seconds.get(stage.name, 0.0) + time.monotonic() - started

    # ---------------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, in_stage: dict[str, Any] | None) -> Event:
        """in_stage: what only matters until the stage is over; none between stages."""
        self._require_agreement(f"the model after step {self.progress.step}")
        if self.world.is_main:
            save_checkpoint(self.output, self._state(in_stage))
        return {"event": "checkpoint", "step": self.progress.step, "path": str(self.output / CHECKPOINT)}

    def _state(self, in_stage: dict[str, Any] | None) -> dict[str, Any]:
        scaler = self.precision.scaler
        return self._origin | {
            "stage": self.progress.stage,
            "step": self.progress.step,
            "difference": self.progress.difference,
            "seconds": self.progress.seconds,
            "model": self.model.state_dict(),
            "pruning": self.pruning.state_dict(),
            "floor": self.floor.state_dict() if self.floor else None,
            "in_stage": in_stage,
            "scaler": scaler.state_dict() if scaler else None,
            "rng": capture_rng(),
            "metrics_bytes": self.metrics.flush_to_disk(),
        }

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """What the run starts from: a resumed one must agree on it, and all processes."""
        weights = digest(self.dense.state_dict())
        return {"recipe": self._settings, "weights": weights, "data": dict(self.splits.fingerprints)}

    @property
    def _settings(self) -> str:
        """What a resumed run must agree on: all but the exports, so that an export that fails costs no training."""
        return dump_recipe(self.recipe.model_copy(update={"export": (), "opset": 18}))

    def _restore(self) -> Events:
        """Continue from the last whole checkpoint of the output folder, if there is one."""
        checkpoint = self.world.share(load_checkpoint(self.output) if self.world.is_main else None)
        if checkpoint is None:
            yield {"event": "note", "text": f"{self.output} holds no checkpoint: the run starts at its beginning"}
            return
        state = checkpoint.state
        with _foreign_state(checkpoint.path):
            recipe, weights, data = str(state["recipe"]), str(state["weights"]), dict(state["data"])
        if recipe != self._settings:
            changed = _changed_lines(recipe, self._settings)
            raise OutputError(
                f"{checkpoint.path} was made with another recipe ({changed}): resume with the same one, or --overwrite"
            )
        if weights != self._origin["weights"]:
            raise OutputError(
                f"{checkpoint.path} was made from another model file: resume with the same, or --overwrite"
            )
        if data != self.splits.fingerprints:
            changed = _changed_data(data, self.splits.fingerprints)
            raise OutputError(
                f"{checkpoint.path} was made with other data ({changed}): resume with the same, or --overwrite"
            )
        with _foreign_state(checkpoint.path):
            self._restore_state(state)
        self.notes += [f"{path} was damaged; the one before it was used" for path in checkpoint.damaged]
        stage = self.stages[self.progress.stage].name if self.progress.stage < len(self.stages) else "export"
        yield {"event": "resumed", "stage": stage, "step": self.progress.step, "path": str(checkpoint.path)}

    def _restore_state(self, state: dict[str, Any]) -> None:
        self._restore_model(state["pruning"], state["model"])
        if self.floor:
            self.floor.load_state_dict(state["floor"])
        seconds = {str(name): float(spent) for name, spent in state["seconds"].items()}
        self.progress = Progress(int(state["stage"]), int(state["step"]), float(state["difference"]), seconds)
        if not (0 <= self.progress.stage <= len(self.stages) and self.progress.step >= 0):
            raise ValueError(f"stage {self.progress.stage}, step {self.progress.step}")
        self._restored = state["in_stage"]
        if self.precision.scaler and state["scaler"]:
            self.precision.scaler.load_state_dict(state["scaler"])
        restore_rng(state["rng"])
        self._metrics_bytes = max(0, int(state["metrics_bytes"]))


def augmentation(recipe: Recipe) -> Augmentation:
    return Augmentation(**recipe.data.augment.model_dump())


def _changed_lines(old: str, new: str) -> str:
    """The first setting that differs, for a message."""
    for left, right in zip(old.splitlines(), new.splitlines()):
        if left != right:
            return f"{left.strip()[:100]} there, {right.strip()[:100]} here"
    return "more settings in one of them"


@contextlib.contextmanager
def _foreign_state(path: Path) -> Iterator[None]:
    """While a checkpoint is taken over: a right checksum does not say that this version of dpm wrote it."""
    try:
        yield
    except Exception as error:  # whatever stands in it instead
        raise OutputError(
            f"{path} holds no state that this run can continue from ({one_line(error)}): start anew with --overwrite"
        ) from None


def _changed_data(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The first set of images that differs, for a message."""
    for name, here in new.items():
        there = str(old.get(name, "none"))
        if there != here:
            left, right = (text.partition(",")[0][:100] for text in (there, here))
            return f"{name}: {left} there, {right} here" if left != right else f"{name}: {left}, but not the same"
    return "more of it there"

"""Train a model with the optimizer, loss and settings of one stage."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dpm_cli.data.splits import Batch
from dpm_cli.engine.distributed import ALONE, World
from dpm_cli.engine.graphs import Forward, Recorder, unchanged
from dpm_cli.engine.layout import lay_out_state_
from dpm_cli.engine.optimizer import OptimizerState, make_optimizer, optimizer_state, restore_optimizer_state_
from dpm_cli.engine.precision import Precision
from dpm_cli.engine.schedule import learning_rate, set_learning_rate_
from dpm_cli.engine.step import Hook, compute_gradients, train_step
from dpm_cli.graph.compact import KeptPositions
from dpm_cli.graph.optimizer_state import shrink_optimizer_
from dpm_cli.layers.modes import in_mode
from dpm_cli.recipe.sections import Engine, Training
from dpm_cli.tasks.classification import classification_loss, distillation_loss, main_output, mixup


class Learner:
    """Takes training steps for one stage. The learning rate is a function of the step alone."""

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        *,
        precision: Precision,
        steps_per_epoch: int,
        seed: int,
        layout: torch.memory_format = torch.channels_last,
        teacher: nn.Module | None = None,
        world: World = ALONE,
        engine: Engine = Engine(),  # noqa: B008
    ) -> None:
        """seed: for mix-up, and for dropout across processes. layout: memory format of images and model.

        teacher: the dense model, in eval mode, for distillation.
        """
        self.model, self.training, self.precision, self.teacher, self.world = model, training, precision, teacher, world
        self.steps_per_epoch, self.steps = steps_per_epoch, training.epochs * steps_per_epoch
        self._seed, self._layout = seed, layout
        self.notes: list[str] = []  # for the user, until somebody reads them
        self._uses_graphs = engine.compile == "auto" and world.size == 1 and next(model.parameters()).is_cuda
        self._forward = self._recorded(model)
        self._teach = self._recorded(teacher) if teacher else None
        self.optimizer = make_optimizer(model, training)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of the stage."""
        return learning_rate(step, self.training, steps=self.steps, steps_per_epoch=self.steps_per_epoch)

    def step_(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        step: int,
        count: float | None = None,
        before: Sequence[Hook] = (),
        after: Sequence[Hook] = (),
    ) -> Tensor:
        """Take one training step of the stage; return the loss () on the device. Hooks as in `train_step`.

        count: images in the whole batch, if this is one process's slice of it. The loss is that of the whole batch.
        """
        training = self.training
        set_learning_rate_(self.optimizer, self.learning_rate(step))
        self.world.seed(self._seed, step)
        mixed = mixup(images, labels, training.mixup, seed=self._seed, step=step, roll=self.world.roll)
        images = mixed.images.contiguous(memory_format=self._layout)

        def objective(outputs: object, labels: Tensor) -> Tensor:
            distill = training.distill if self._teach else 0.0
            terms = []
            if distill < 1:
                loss = classification_loss(
                    outputs,
                    labels,
                    label_smoothing=training.label_smoothing,
                    partners=mixed.partners,
                    share=mixed.share,
                )
                terms.append((1 - distill) * loss if distill else loss)
            if distill and self._teach:
                with torch.no_grad():
                    taught = self._teach(images)
                terms.append(distill * distillation_loss(outputs, taught, training.temperature))
            loss = sum(terms[1:], start=terms[0])
            return self.world.weigh(loss, len(labels), count or len(labels))

        loss = train_step(
            self._forward,
            self.optimizer,
            images,
            mixed.labels,
            objective=objective,
            precision=self.precision,
            world=self.world,
            clip_grad=training.clip_grad,
            before_step=before,
            after_step=after,
        )
        return self.world.mean(loss)

    def show(self, batches: Iterable[Batch], *, labelled: bool, read: Hook) -> None:
        """Let `read` see the gradients that each batch gives, without distillation and at unchanged weights.

        With an fp16 scaler they may not be finite. labelled: if not, labels are drawn from what the model says.
        """
        model, device = self.model, next(self.model.parameters()).device
        dice = torch.Generator(device).manual_seed(self._seed + self.world.rank)

        def objective(outputs: object, labels: Tensor) -> Tensor:
            if not labelled:
                said = main_output(outputs).detach().float().softmax(1)  # (B, classes)
                labels = torch.multinomial(said, 1, generator=dice)[:, 0]
            (count,) = self.world.sum(len(labels))
            return self.world.weigh(classification_loss(outputs, labels), len(labels), count)

        with unchanged(model, device), in_mode(model, training=True):
            for images, labels in batches:
                images = images.contiguous(memory_format=self._layout)
                compute_gradients(
                    self._forward,
                    self.optimizer,
                    images,
                    labels,
                    objective=objective,
                    precision=self.precision,
                    world=self.world,
                )
                if self.precision.scaler is not None:
                    self.precision.scaler.update()
                read()

    def shrink_(self, before: Mapping[str, nn.Parameter], kept: KeptPositions) -> None:
        """Move the optimizer to the new parameters after compaction. Arguments as for `shrink_optimizer_`."""
        shrink_optimizer_(self.optimizer, self.model, before, kept)
        if self.optimizer.defaults.get("fused"):
            lay_out_state_(self.optimizer)
        self._forward = self._recorded(self.model)

    def _recorded(self, model: nn.Module) -> Forward:
        """Let a model run as a CUDA graph where that is faster. Several processes average gradients instead."""
        forward = self.world.wrap(model) if model is self.model else model
        if not self._uses_graphs or forward is not model:
            return forward
        return Recorder(model, self.precision, self.notes)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that training changes: the state of the model and of the optimizer."""
        yield from self.model.state_dict().values()
        for remembered in optimizer_state(self.optimizer, self.model).values():
            yield from (value for value in remembered.values() if isinstance(value, Tensor))

    def state_dict(self) -> OptimizerState:
        return optimizer_state(self.optimizer, self.model)

    def load_state_dict(self, state: OptimizerState) -> None:
        restore_optimizer_state_(self.optimizer, self.model, state)

"""A model in training: its optimizer, its loss and one stage's settings."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dpm_cli.engine.distributed import ALONE, World
from dpm_cli.engine.optimizer import OptimizerState, make_optimizer, optimizer_state, restore_optimizer_state_
from dpm_cli.engine.precision import Precision
from dpm_cli.engine.schedule import learning_rate, set_learning_rate_
from dpm_cli.engine.step import Hook, train_step
from dpm_cli.tasks.classification import classification_loss, distillation_loss, mixup

Shrink = Callable[[str, Tensor], Tensor]  # (parameter name, its old tensor) -> the part that stays


class Learner:
    """Takes training steps for one stage. The learning rate is a function of the step alone.

    seed: for mix-up, and over several processes for dropout. layout: of the images, as of the model. teacher: the dense
    model, in eval mode, for distillation.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: Precision,
        steps: int,
        steps_per_epoch: int,
        optimizer: Literal["sgd", "adam", "adamw"],
        lr: float,
        momentum: float,
        nesterov: bool,
        schedule: Literal["cosine", "step", "multistep", "triangular", "constant"],
        milestones: Sequence[float],
        step_size: int,
        gamma: float,
        warmup_epochs: float,
        weight_decay: float,
        label_smoothing: float,
        mixup: float,
        clip_grad: float | None,
        distill: float,
        temperature: float,
        seed: int,
        layout: torch.memory_format = torch.channels_last,
        teacher: nn.Module | None = None,
        world: World = ALONE,
    ) -> None:
        self.model, self.precision, self.steps, self.teacher, self.world = model, precision, steps, teacher, world
        self._layout = layout
        self._forward = world.wrap(model)
        self._make_optimizer = partial(
            make_optimizer,
            model,
            name=optimizer,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
        )
        self.optimizer = self._make_optimizer()
        self.learning_rate = partial(
            learning_rate,
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            lr=lr,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            milestones=milestones,
            step_size=step_size,
            gamma=gamma,
        )
        self._smoothing, self._mixup, self._clip_grad, self._seed = label_smoothing, mixup, clip_grad, seed
        self._distill, self._temperature = (distill if teacher else 0.0), temperature

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
        """One training step of the stage; returns the loss () on the device. Hooks as in `train_step`.

        count: images of the whole batch, if this is one process's slice of it; the loss is that of all of them.
        """
        set_learning_rate_(self.optimizer, self.learning_rate(step))
        self.world.seed(self._seed, step)
        mixed = mixup(images, labels, self._mixup, seed=self._seed, step=step, world=self.world)
        images = mixed.images.contiguous(memory_format=self._layout)

        def objective(outputs: object, labels: Tensor) -> Tensor:
            loss = classification_loss(
                outputs, labels, label_smoothing=self._smoothing, partners=mixed.partners, share=mixed.share
            )
            if self._distill and self.teacher:
                with torch.no_grad():
                    taught = self.teacher(images)
                softened = distillation_loss(outputs, taught, self._temperature)
                loss = (1 - self._distill) * loss + self._distill * softened
            return self.world.weigh(loss, len(labels), count or len(labels))

        loss = train_step(
            self._forward,
            self.optimizer,
            images,
            mixed.labels,
            objective=objective,
            precision=self.precision,
            world=self.world,
            clip_grad=self._clip_grad,
            before_step=before,
            after_step=after,
        )
        return self.world.mean(loss)

    def shrink_(self, shrink: Shrink) -> None:
        """After compaction: a new optimizer for the new parameters, with what it remembers of those that stay.

        The optimizer's state is looked up by name, so the model's names must not have changed.
        """
        old = self._remembered
        self._forward = self.world.wrap(self.model)
        self.optimizer = self._make_optimizer()
        restore_optimizer_state_(
            self.optimizer,
            self.model,
            {
                name: {
                    key: shrink(name, value) if isinstance(value, Tensor) and value.dim() else value
                    for key, value in values.items()
                }
                for name, values in old.items()
            },
        )

    def remember(self) -> None:
        """Call before compaction, while the optimizer's parameters are still the model's."""
        self._remembered: OptimizerState = optimizer_state(self.optimizer, self.model)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that training changes: the model's state and what the optimizer remembers."""
        yield from self.model.state_dict().values()
        for remembered in optimizer_state(self.optimizer, self.model).values():
            yield from (value for value in remembered.values() if isinstance(value, Tensor))

    def state_dict(self) -> OptimizerState:
        return optimizer_state(self.optimizer, self.model)

    def load_state_dict(self, state: OptimizerState) -> None:
        restore_optimizer_state_(self.optimizer, self.model, state)

"""Run the Decay Pruning Method in your own training loop."""

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from dpm_cli.errors import TargetError, UsageError
from dpm_cli.events import Event, RoundStarted
from dpm_cli.graph import Groups
from dpm_cli.graph.optimizer_state import shrink_optimizer_
from dpm_cli.graph.program import Example
from dpm_cli.layers.copyable import keep_copyable_
from dpm_cli.method.pruners import BasePruner, make_base
from dpm_cli.method.pruning import Pruning, tell_removal
from dpm_cli.method.schedule import plan_schedule
from dpm_cli.method.survey import survey
from dpm_cli.recipe.check import check_section
from dpm_cli.recipe.sections import Decay, Prune, Training
from dpm_cli.recipe.stages import number_epochs

Settings = Mapping[str, Any]


class Pruner:
    """Shrinks a model while your own loop trains it (DPM, arXiv 2406.03879).

        pruner = dpm_cli.Pruner(model, example, target={"macs": 0.5}, steps=len(loader) * epochs)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for images, labels in loader:                # as often as you like, `steps` optimizer steps in all
            criterion(model(images), labels).backward()
            pruner.before_step()
            optimizer.step()
            optimizer.zero_grad()
            pruner.after_step(optimizer)
        pruner.finish()
        dpm_cli.save(model, "slim.pt")

    With gradient accumulation, make both calls only around the optimizer's step. Clip between `before_step` and the
    step. With a `GradScaler`, unscale before `before_step`; a step that the scaler skips is skipped here too. A
    scheduler may hold the optimizer: it stays the same object while its parameters and momenta shrink.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        *,
        target: Settings,
        steps: int,
        base: str = "depgraph",
        prune: Settings | None = None,
        decay: Settings | None = None,
        remove_every: int | None = None,
        seed: int = 0,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        """Analyse a model, and plan the rounds in which it shrinks. Make the optimizer afterwards.

        model: trained, on any device; it is changed in place. example: inputs as the model takes them, one tensor
        (B, …), a tuple of several, or a mapping of them by name. target: {"macs": 0.5}, as in recipes; params and
        channels too. steps: optimizer steps that the loop will take; 0 cuts at once. base, prune, decay: as in recipes.
        remove_every: steps between removals of dead units in a long round (base otov2); None: only at its end.

        Raises RecipeError, UnsupportedModelError, TargetError or UsageError, each in one line, before any change.
        """
        if steps < 0:
            raise UsageError(f"steps is {steps}; it counts the optimizer steps that are to come")
        values = {"base": base, "target": dict(target)} | dict(prune or {})
        settings = check_section(Prune, values, "prune")
        if settings.floor is not None:
            name = "prune.max_drop" if settings.target.drop is None else "target drop"
            raise UsageError(f"{name} is measured on validation images, which only dpm prune has: give macs alone")
        fades = check_section(Decay, dict(decay or {}), "decay")
        chosen = make_base(settings, Training(epochs=steps), seed=seed)
        if chosen.observes:  # in your own loop before the first round; one of ours shows batches on purpose
            if not steps:
                raise UsageError(f"steps is 0, but {chosen.title} judges by the gradients of steps: give at least one")
            observed = max(1, min(chosen.observes, round(settings.last * steps) // 2))
            settings = settings.model_copy(update={"start": max(settings.start, observed / steps)})
        stages = number_epochs(chosen.stages())
        if any(stage.ends_with_pruning or not stage.prunes for stage in stages):
            names = ", ".join(dict.fromkeys(stage.name for stage in stages))
            raise UsageError(f"{chosen.title} needs stages of its own ({names}), which dpm prune alone can give it")
        example = _at_least_two(example)
        dense = copy.deepcopy(keep_copyable_(model)).cpu().eval()
        found = survey(dense, _to(example, torch.device("cpu")), settings, chosen)
        rounds = plan_schedule(settings, Training(epochs=steps), fades, steps_per_epoch=1, epochs="steps")
        goal = found.goal(settings.target)

        self.model, self.steps, self.step, self.skipped = model, steps, 0, 0
        self._tell, self._remove_every = on_event or (lambda event: None), remove_every
        self._pruning = Pruning(model, found.groups, chosen, goal, rounds, fades)
        self._example = _to(example, self._pruning.units.device)
        self._has_observed = self._is_finished = False
        self._met: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._rates: list[float] = []  # learning rates of the optimizer steps since the last `after_step`
        self._hook = register_optimizer_step_post_hook(_Watcher(self))
        chosen.enter(stages[0], model, 0)
        _origins[model] = Origin(dense.to("meta"), _image_shape(example))
        if not steps:  # otherwise the first step starts a round, as `load_state_dict` needs the dense model
            self._start_round()
            self._remove(())

    @property
    def groups(self) -> Groups:
        """Return the groups of the remaining units, and the layers that stay whole with the reasons."""
        return self._pruning.groups

    @property
    def base(self) -> BasePruner:
        """Return the base pruner, which decides what is redundant."""
        return self._pruning.base

    @property
    def is_done(self) -> bool:
        """Tell whether the target is met and no unit is decaying. Further steps only train the slim model."""
        return self._pruning.is_done

    def cost(self) -> int:
        """Return the remaining cost in the unit of the target: MACs for one input, parameters, or channels."""
        return self._pruning.cost()

    def before_step(self) -> None:
        """Call between `backward` and the optimizer's step, before gradients are clipped.

        Raises UsageError if called out of order, TargetError if all steps are over and the target is not met.
        """
        if self._is_finished:
            raise UsageError("before_step was called after finish: make a new Pruner to prune further")
        if self._has_observed:
            raise UsageError("before_step was called twice: call after_step(optimizer) after the optimizer's step")
        if self.step >= self.steps and not self.is_done:
            raise self._missed()
        if not self.is_done:
            if all(parameter.grad is None for parameter in self._pruning.units.parameters):
                raise UsageError("before_step found no gradients: call it between loss.backward() and optimizer.step()")
            if self._pruning.is_due(self.step):
                self._start_round()
            if self.base.observes:
                self.base.observe_()
            self._pruning.before_step_()
        self._rates.clear()
        self._has_observed = True

    def after_step(self, *optimizers: Optimizer) -> None:
        """Let units decay, release them or remove them. Call after the optimizer's step.

        optimizers: all that hold parameters of the model, usually one; they lose the state of removed units. Raises
        UsageError if called out of order, RunError if a removal would change outputs.
        """
        if not self._has_observed:
            raise UsageError("after_step was called without before_step, which belongs between backward and the step")
        self._has_observed = False
        self._require_ours(optimizers)
        if not self._rates:  # a GradScaler found a non-finite gradient and skipped the step
            self.skipped += 1
            return
        for optimizer in optimizers:
            if optimizer not in self._met:
                self.base.meet(optimizer)
                self._met.add(optimizer)
        step, self.step = self.step, self.step + 1
        if self.is_done:
            return
        self._pruning.after_step_(step, max(self._rates))
        is_mid_round = self._remove_every and self.step % self._remove_every == 0 and self._pruning.has_dead
        if self._pruning.is_over or is_mid_round:
            self._remove(optimizers)

    def finish(self) -> None:
        """Call when the loop is over.

        Raises TargetError if the target is not met. The model then stays as it is, or, where no step could help because
        layers had to stay whole, is finished.
        """
        if not self.is_done:
            raise self._missed()
        self._hook.remove()
        self._pruning.unwrap_()
        self._is_finished = True
        if self.cost() > self._pruning.wanted:
            left = self._pruning.goal.describe(self.cost())
            raise TargetError(
                f"target {self._pruning.goal} is not met, because layers had to stay whole: {left} are left"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what an interrupted loop needs to resume, besides the states of model and optimizer."""
        return {"step": self.step, "skipped": self.skipped, "pruning": self._pruning.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an interrupted loop, bit for bit.

        Build the dense model and its Pruner as before; load this state, then the model's; then make the optimizer and
        load its state. Raises ValueError if the state belongs to another model.
        """
        self._pruning.load_state_dict(state["pruning"])
        self.step, self.skipped = int(state["step"]), int(state["skipped"])

    def _start_round(self) -> None:
        self._tell(RoundStarted(stage="train", step=self.step, **asdict(self._pruning.start_round())))

    def _remove(self, optimizers: tuple[Optimizer, ...]) -> None:
        """Remove the dead units from the model and the optimizers."""
        pruning = self._pruning
        removal = pruning.finish_round(self._example) if pruning.is_over else pruning.remove_dead(self._example)
        for optimizer in optimizers:
            shrink_optimizer_(optimizer, self.model, removal.before, removal.kept)
        for event in tell_removal(pruning, removal, stage="train", step=self.step):
            self._tell(event)

    def _require_ours(self, optimizers: tuple[Optimizer, ...]) -> None:
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        named = zip(self._pruning.units.names, self._pruning.units.parameters)
        missing = [name for name, parameter in named if parameter.requires_grad and id(parameter) not in held]
        if missing:
            raise UsageError(
                f"the optimizer does not hold the model's parameter {missing[0]!r}: make it after the Pruner "
                "(and after load_state_dict) from model.parameters(); if there are several, give after_step all of them"
            )

    def _stepped(self, optimizer: Optimizer) -> None:
        """Note the step of any optimizer in this process; a fused one also runs when it skips the step."""
        ours = {id(parameter) for parameter in self._pruning.units.parameters}
        rates = [float(g["lr"]) for g in optimizer.param_groups if any(id(p) in ours for p in g["params"])]
        found_inf = getattr(optimizer, "found_inf", None)
        if rates and not (isinstance(found_inf, Tensor) and bool(found_inf)):
            self._rates += rates

    def _missed(self) -> TargetError:
        goal = self._pruning.goal
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return TargetError(
            f"target {goal} is not met after {self.step} of {self.steps} steps{skipped}: "
            f"{goal.describe(self.cost())} are left; take all steps, or give more"
        )


@dataclass(frozen=True)
class Origin:
    """Remembers what a model was before it was pruned."""

    dense: nn.Module  # without data, on the meta device
    shape: tuple[int, int, int] | None  # channels, height and width of one image, if it takes one batch of images


def find_origin(model: nn.Module) -> Origin | None:
    """Return what a model was before a Pruner of this process changed it; None for any other model."""
    return _origins.get(model)


_origins: "weakref.WeakKeyDictionary[nn.Module, Origin]" = weakref.WeakKeyDictionary()


class _Watcher:
    """Tells a Pruner about optimizer steps without keeping it alive."""

    def __init__(self, pruner: Pruner) -> None:
        self._pruner = weakref.ref(pruner)

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        pruner = self._pruner()
        if pruner is not None:
            pruner._stepped(optimizer)


def _at_least_two(example: Example) -> Example:
    """Repeat an example to a batch of at least two, which the analysis needs."""
    sizes = {len(leaf) for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()}
    if sizes != {1}:
        return example
    doubled: Example = tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, example)
    return doubled


def _image_shape(example: Example) -> tuple[int, int, int] | None:
    inputs = example if isinstance(example, tuple) else (example,)
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].dim() != 4:
        return None
    channels, height, width = inputs[0].shape[1:]
    return channels, height, width


def _to(example: Example, device: torch.device) -> Example:
    moved: Example = tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), example)
    return moved

"""Hold the model that a run prunes, with everything that changes with its structure."""

import copy
from collections.abc import Iterator
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import nn

from dpm_cli.engine.loop import State
from dpm_cli.engine.precision import choose_layout, lay_out_
from dpm_cli.engine.setup import Setup
from dpm_cli.errors import listing
from dpm_cli.graph import Groups
from dpm_cli.graph.folding import fold_means_
from dpm_cli.graph.labels import Flags
from dpm_cli.method.budget import choose_victims
from dpm_cli.method.pruners import BasePruner, make_base
from dpm_cli.method.pruning import Pruning, foresee
from dpm_cli.method.schedule import plan_schedule
from dpm_cli.method.survey import survey
from dpm_cli.recipe import Recipe
from dpm_cli.recipe.stages import Stage, number_epochs
from dpm_cli.run.latency import FIRST_ATTEMPTS, Meter
from dpm_cli.run.teacher import copy_teacher


class Subject:
    """Holds a model during pruning. It starts dense and can be reset."""

    def __init__(self, module: nn.Module, recipe: Recipe, setup: Setup) -> None:
        """module: dense, in eval mode on the CPU; it is copied. Raises what `survey`, `rounds` and `goal` raise."""
        self.setup, self.recipe = setup, recipe
        self.unfolded: set[str] = set()  # layers that could not take the means of removed units
        self.difference = 0.0  # largest difference between outputs before and after any removal
        base = self._make_base()
        self.meter = (
            Meter(recipe.prune.latency, recipe.model.input, setup.world, setup.device)
            if recipe.prune.target.latency
            else None
        )
        found = survey(
            module,
            torch.zeros(2, *recipe.model.input),
            recipe.prune,
            base,
            folds_means=recipe.folds_means,
            time_widths=self.meter.time_widths if self.meter else None,
        )
        self._start, self._shifts = found.module, found.shifts
        self.dense_groups, self.round_to = found.groups, found.round_to
        self.layout = choose_layout(self._start, torch.zeros(2, *recipe.model.input))
        self.stages = number_epochs([*base.stages(), Stage("finetune", recipe.finetune, "finetune.")])
        self.rounds = plan_schedule(recipe.prune, recipe.train, recipe.decay, steps_per_epoch=setup.steps_per_epoch)
        self._goal = goal = found.goal(recipe.prune.target)
        if self.meter:  # the widths depend on the scores that training will give; the prediction is corrected for any
            scores = np.random.default_rng(recipe.seed).random(found.groups.units)
            self.meter.settle(
                lambda: ~choose_victims(found.groups, found.widths, scores, kind=goal.kind, limit=goal.limit),
                self._latency_limit,
                attempts=FIRST_ATTEMPTS,
            )
        self.model, self.pruning = self._begin()
        self.teacher = copy_teacher(self.model, self.stages)

    @property
    def _latency_limit(self) -> int:
        """Return the nanoseconds that the target allows."""
        return next(limit for kind, (_, limit) in self._goal.asked.items() if str(kind) == "latency")

    def settle_latency(self) -> None:
        """Correct the prediction by an export of what would be left, before a round that should meet the target."""
        if self.meter and self.pruning.round + 1 >= len(self.rounds.starts):
            self.meter.settle(partial(foresee, self.pruning), self._latency_limit)

    def check_latency(self) -> None:
        """Measure a real export once pruning is done, if the target limits latency; if too slow, it is not done."""
        if self.meter and self.pruning.is_done:
            pruning = self.pruning
            self.meter.check(self.model, pruning.groups.cost, pruning.all_alive, self._latency_limit)

    def _make_base(self) -> BasePruner:
        return make_base(self.recipe.prune, self.recipe.train, seed=self.setup.seed)

    def _begin(self) -> tuple[nn.Module, Pruning]:
        recipe = self.recipe
        model = copy.deepcopy(self._start).to(self.setup.device)
        lay_out_(model, self.layout)
        return model, Pruning(
            model,
            self.dense_groups,
            self._make_base(),
            self._goal,
            self.rounds,
            recipe.decay,
            fold_means=self._fold_means if recipe.folds_means else None,
        )

    def tell_auto(self) -> Iterator[str]:
        """Say what the settings that are `auto` turned out to be, in sentences for the user."""
        prune, decay = self.recipe.prune, self.recipe.decay
        if prune.round_to == "auto":
            yield f"prune.round_to is auto: widths are multiples of {self.round_to}"
        if prune.rounds == "auto" and self.pruning.base.pace != "steps":
            yield f"prune.rounds is auto: {len(self.rounds.starts)} planned"
        if decay.steps == "auto":
            steps = self.rounds.decay_steps
            yield f"decay.steps is auto: {f'units decay over {steps} steps' if steps > 1 else 'units are cut at once'}"

    @property
    def notes(self) -> list[str]:
        """Return notes for the user, one sentence each, on what was removed."""
        if not self.unfolded:
            return []
        layers = listing(sorted(self.unfolded))
        return [f"no means were folded into {layers}, whose weights are used by other code than their own"]

    def begin_again(self, state: State | None) -> None:
        """Return to an earlier state or to the dense model, and undo the base pruner's changes."""
        self.model, self.pruning = self._begin()
        self.unfolded.clear()
        if state:
            self.load_state_dict(state)
        self.pruning.unwrap_()

    def state_dict(self) -> State:
        """Return the state; its tensors are not copied."""
        latency = {"latency": self.meter.state_dict()} if self.meter else {}
        return {
            "pruning": self.pruning.state_dict(),
            "model": self.model.state_dict(),
            "difference": self.difference,
            "unfolded": sorted(self.unfolded),
        } | latency

    def load_state_dict(self, state: State) -> None:
        """Load an earlier state into the dense model."""
        self.pruning.load_state_dict(state["pruning"])
        lay_out_(self.model, self.layout)
        self.model.load_state_dict(state["model"])
        self.difference, self.unfolded = float(state["difference"]), set(state["unfolded"])
        if self.meter:
            self.meter.load_state_dict(state["latency"])

    def _fold_means(self, groups: Groups, alive: Flags) -> None:
        """Fold the mean outputs of units into the layers that read them, before the units are cut at once."""
        epoch = sum(stage.training.epochs for stage in self.stages)  # one that no stage uses
        images = (batch for batch, _ in islice(self.setup.epoch_batches(epoch), self.recipe.compact.fold_batches))
        self.unfolded.update(fold_means_(self.model, groups, alive, images, self._shifts, pool=self.setup.world.mean))

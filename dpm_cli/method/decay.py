"""Smooth Pruning: one state machine over all units (DPM, arXiv 2406.03879).

The norm of a victim falls linearly to zero over N optimizer steps while training continues; only its direction is
free. As published: L_init = ‖x‖ when the decay starts, L_s = L_init / N, and after each optimizer step
x ← x̃ · (N − n) L_s / ‖x̃‖. Here every unit has its own age n, incremented before use, so the norm is zero at n = N;
x is the union of the unit's producer side (rows, biases, norm weight and bias), so that a dead unit's output is
exactly zero. The "multiplicative" envelope is HESSO's, x ← x̃ · (N − n)/(N − n + 1): it keeps
part of each gradient step, while DPM fixes the norm.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dpm_cli.graph import Units
from dpm_cli.graph.labels import Flags
from dpm_cli.method.budget import Scores
from dpm_cli.method.rectify import Rectifier
from dpm_cli.method.reselect import Reselection

Envelope = Literal["exact", "shrink-only", "multiplicative"]


class Decay:
    """Takes units from alive to decaying to dead, or back to alive if released. All state is (units,) on the device.

    At every training step call `observe` between backward and the optimizer's step (before penalties), and `advance_`
    after it. Nothing here waits for the device; `dead`, `released` and the rest are read at rounds and epoch ends.
    """

    def __init__(
        self,
        units: Units,
        *,
        steps: int,
        envelope: Envelope = "exact",
        rectifier: Rectifier | Reselection | None = None,
        whole: Units | None = None,
    ) -> None:
        """units: entries scaled while decaying. whole: entries zeroed at death, if these are more."""
        self.units, self.whole, self.steps = units, whole or units, steps
        self.envelope, self.rectifier = envelope, rectifier
        none = torch.zeros(units.count, dtype=torch.bool, device=units.device)
        self.decaying, self.dead = none.clone(), none.clone()
        self.released = none.clone()  # since the last `start`; spared until the next round is over
        self.releases = torch.zeros(units.count, dtype=torch.int64, device=units.device)
        self.age = torch.zeros_like(self.releases)
        self.initial = torch.zeros(units.count, device=units.device)
        self.norms = torch.zeros_like(self.initial)  # ‖x‖ during a round, from the last projection
        self.rectifying = rectifier is not None
        self.remaining = 0  # calls of `advance_` until all started decays are over

    def start(self, victims: Flags | Tensor, *, rectify: bool = True, scores: Scores | None = None) -> None:
        """Start a round with these victims. rectify=False: no unit is released, so the round is sure to end.

        scores: (units,) that they were chosen by; a `Reselection` needs them.
        """
        self.released = torch.zeros_like(self.released)
        self.rectifying = rectify and self.rectifier is not None
        if isinstance(self.rectifier, Reselection) and scores is not None:
            self.rectifier.start(scores)
        self.add(victims)

    def reconsider(self) -> Scores | None:
        """Return the scores by which victims are to be chosen anew now, if a `Reselection` wants that at this step."""
        rectifier = self.rectifier
        if not (isinstance(rectifier, Reselection) and self.rectifying):
            return None
        return rectifier.scores() if rectifier.is_due(self.steps - self.remaining, self.steps) else None

    def exchange(self, victims: Flags) -> None:
        """Let exactly these units decay from now on: others are released, new ones are zero when the old ones are.

        victims: (units,), after a call of `advance_`.
        """
        spared = self.decaying & ~torch.as_tensor(victims).to(self.units.device)
        self.released, self.releases = self.released | spared, self.releases + spared
        self.decaying = self.decaying & ~spared
        self.add(victims, age=self.steps - self.remaining)

    def add(self, victims: Flags | Tensor, *, age: int = 0) -> None:
        """Let these units decay from now on. With `steps` = 1 they die at once (one-step pruning).

        victims: (units,). age: steps of their decay that are over; from their present norm they are zero the sooner.
        """
        chosen = torch.as_tensor(np.asarray(victims) if not isinstance(victims, Tensor) else victims)
        chosen = chosen.to(self.units.device) & ~self.dead & ~self.decaying
        norms = self.units.norm()
        self.initial = torch.where(chosen, norms * (self.steps / (self.steps - age)), self.initial)
        self.age = torch.where(chosen, age, self.age)
        self.remaining = self.steps - age if self.steps > 1 else 0
        gone = chosen if self.steps == 1 else chosen & (norms == 0)
        self.dead |= gone
        self.decaying |= chosen & ~gone
        self.norms = torch.where(self.dead, 0.0, norms)
        self._zero_dead_()

    def cut_(self) -> None:
        """Let all decaying units die at once, where no training is left to decay in."""
        self.dead, self.decaying = self.dead | self.decaying, torch.zeros_like(self.decaying)
        self.remaining = 0
        self._zero_dead_()

    def observe(self) -> None:
        """Read the gradients. Call before the optimizer's step, while gradients come from the loss alone."""
        if self.rectifier and self.rectifying:
            self.rectifier.observe(self.units, self.norms)

    def advance_(self) -> None:
        """Release, shrink and kill units. Call after the optimizer's step."""
        self.remaining = max(self.remaining - 1, 0)
        norms = self.units.norm()  # ‖x̃‖
        self.age = self.age + self.decaying
        if self.rectifier and self.rectifying:
            resists = self.rectifier.judge(self.units, norms, self.decaying, self.age, self.initial, self.steps)
            resists &= self.releases < self.rectifier.settings.limit
            self.released = self.released | resists
            self.releases = self.releases + resists
            self.decaying = self.decaying & ~resists
        left = (self.steps - self.age).clamp_min(0)
        if self.envelope == "multiplicative":
            factor = left / (left + 1)
        else:
            factor = torch.where(norms > 0, self.initial * (left / self.steps) / norms, 0.0)
        if self.envelope == "shrink-only":
            factor = factor.clamp(max=1.0)
        finished = self.decaying & ((self.age >= self.steps) | (norms == 0))
        self.dead = self.dead | finished
        self.decaying = self.decaying & ~finished
        # Momentum and weight decay would revive dead units, so they are zeroed after every step.
        scale = torch.where(self.dead, 0.0, torch.where(self.decaying, factor, 1.0))
        self.units.scale_(scale)
        self.norms = norms * scale
        if self.whole is not self.units:
            self._zero_dead_()

    def _zero_dead_(self) -> None:
        self.whole.scale_(torch.where(self.dead, 0.0, 1.0))

    def rebind(self, units: Units, survivors: Flags, whole: Units | None = None) -> None:
        """Continue with the units of the compacted model. survivors: (units before,)"""
        index = torch.from_numpy(np.flatnonzero(survivors)).to(self.units.device)
        for name in STATE:
            setattr(self, name, getattr(self, name)[index])
        if self.rectifier:
            self.rectifier.select(index)
        self.units, self.whole = units, whole or units
        self.norms = units.norm()  # rows lost the entries that read dead units

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {name: getattr(self, name) for name in STATE}
        state |= {"rectifying": self.rectifying, "remaining": self.remaining}
        if self.rectifier:
            state["rectifier"] = self.rectifier.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            old = getattr(self, name)
            if (state[name].shape, state[name].dtype) != (old.shape, old.dtype):
                raise ValueError(f"{name} of {tuple(state[name].shape)} for {self.units.count} units")
            setattr(self, name, state[name].to(self.units.device))
        self.rectifying, self.remaining = bool(state["rectifying"]), int(state["remaining"])
        if self.rectifier:
            self.rectifier.load_state_dict(state["rectifier"])


STATE = ("decaying", "dead", "released", "releases", "age", "initial", "norms")

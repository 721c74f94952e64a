"""The accuracy floor of a run: what must hold on the validation images, the last state that did, and what broke it."""

from dataclasses import dataclass
from typing import Any

State = dict[str, Any]


@dataclass
class Floor:
    """How far the validation accuracy may fall below the dense model's. All accuracies are in percent."""

    max_drop: float  # points
    dense: float  # accuracy of the model as it was given
    held: State | None = None  # the last state that held, as `Run` makes it; none: the model as it was given
    broken: str | None = None  # what happened, if the run had to go back: one sentence

    @property
    def limit(self) -> float:
        return self.dense - self.max_drop

    def holds(self, accuracy: float) -> bool:
        return accuracy >= self.limit

    def state_dict(self) -> State:
        return {"dense": self.dense, "held": self.held, "broken": self.broken}

    def load_state_dict(self, state: State) -> None:
        self.dense, self.held, self.broken = float(state["dense"]), state["held"], state["broken"]

"""Guard the validation accuracy of a run, and return to the last good state if it falls too far."""

import copy

from dpm_cli.engine.loop import State
from dpm_cli.events import WentBack
from dpm_cli.report import FloorReport
from dpm_cli.run.subject import Subject


class AccuracyFloor:
    """Limits how far validation accuracy may fall below the dense model's. All accuracies are in percent.

    Without `prune.max_drop` or `target.drop` there is no floor: every state passes, and none is remembered.
    """

    def __init__(self, subject: Subject, max_drop: float | None) -> None:
        """max_drop: points; None for no floor."""
        self.subject, self.max_drop = subject, max_drop
        self.dense = 0.0  # accuracy of the original model
        self.held: State | None = None  # the last state that held the floor; None for the original model
        self.broken: str | None = None  # why the run went back, if it did, in one sentence
        self._seen: float | None = None  # accuracy when it was last compared

    @property
    def limit(self) -> float:
        return self.dense - (self.max_drop or 0.0)

    @property
    def went_back(self) -> bool:
        return self.broken is not None

    @property
    def held_the_target(self) -> bool:
        """Tell whether pruning was finished in the last state that held the floor."""
        return self.held is not None and bool(self.held["is_done"])

    def measure(self) -> float | None:
        """Measure and return the dense accuracy; None without a floor. Call while the model is unchanged."""
        if self.max_drop is None:
            return None
        accuracy = self._validate()
        assert accuracy is not None  # a recipe with a floor has validation images
        self.dense = accuracy
        return accuracy

    def holds(self) -> bool:
        self._seen = None if self.max_drop is None else self._validate()
        return self._seen is None or self._seen >= self.limit

    def compare(self) -> str:
        """Write what `holds` has just compared."""
        return f"validation {self._seen:.2f} %, floor {self.limit:.2f} %"

    def remember(self) -> None:
        """Store the state of the subject as the last one that held the floor."""
        if self.max_drop is None:
            return
        subject = self.subject
        state = subject.state_dict()
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state["model"].items()}
        self.held = {
            "subject": state | {"model": weights, "pruning": copy.deepcopy(state["pruning"])},
            "is_done": subject.pruning.is_done,
        }

    def go_back(self, culprit: str, *, stage: str, step: int) -> WentBack:
        """Return to the last state that held the floor, from one that has just been found not to."""
        subject, difference = self.subject, self.subject.difference
        subject.begin_again(copy.deepcopy(self.held["subject"]) if self.held else None)
        subject.difference = difference
        pruning = subject.pruning
        if not self.broken:
            goal = pruning.goal
            left = f"{goal.kind} {goal.describe(pruning.cost())}" + (f" (target {goal})" if goal.asked else "")
            end = f"the run went back to the last state that held, with {left}"
            if not goal.asked and self._is_whole:
                end = "nothing could be removed: raise target.drop, or train longer"
            below = f"{self.max_drop:g} point{'s' if self.max_drop != 1 else ''} below the dense model"
            self.broken = f"{culprit} broke the accuracy floor and did not recover: {self.compare()} ({below}); {end}"
        return WentBack(
            stage=stage,
            step=step,
            culprit=culprit,
            validation_accuracy=self._seen,
            floor=self.limit,
            macs=pruning.groups.cost.macs(pruning.all_alive),
            params=pruning.groups.cost.parameters(pruning.all_alive),
            units=pruning.groups.units,
        )

    def report(self) -> FloorReport | None:
        """Describe the floor for the report; None without a floor."""
        if self.max_drop is None:
            return None
        pruning = self.subject.pruning
        is_missed = pruning.cost() > pruning.goal.limit if pruning.goal.asked else self._is_whole
        return FloorReport(self.max_drop, self.dense, self.limit, self.went_back and is_missed, self.broken)

    @property
    def _is_whole(self) -> bool:
        """Tell whether no unit has been removed."""
        return bool(self.subject.pruning.ancestry.survivors.all())

    def state_dict(self) -> State:
        return {"dense": self.dense, "held": self.held, "broken": self.broken}

    def load_state_dict(self, state: State) -> None:
        self.dense, self.held, self.broken = float(state["dense"]), state["held"], state["broken"]

    def _validate(self) -> float | None:
        return self.subject.setup.validate(self.subject.model)

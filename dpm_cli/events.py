"""Define what can happen during a run: one frozen dataclass per kind of event.

Jobs pass events to `on_event`. Those that describe the model are also logged to `metrics.jsonl`, one object a line.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """All events derive from this. metrics.jsonl stores `kind` under the key "event"."""

    kind: ClassVar[str]
    is_logged: ClassVar[bool] = False  # whether metrics.jsonl holds it

    def to_dict(self) -> dict[str, Any]:
        """Return the event as a JSON object.

        >>> Note("2 images were left out").to_dict()
        {'event': 'note', 'text': '2 images were left out'}
        """
        return {"event": self.kind} | asdict(self)


@dataclass(frozen=True)
class StagePlan:
    """Describes a stage of the run before it starts."""

    name: str
    epochs: int
    steps: int


@dataclass(frozen=True)
class Wanted:
    """Describes the target of a run.

    limit, dense: the largest allowed cost and the cost of the dense model; None for sparsities, a drop of accuracy, and
    several targets at once.
    """

    kind: str  # macs | params | channels | size | latency | sparsity | drop, or several: "macs and size"
    limit: int | None = None
    dense: int | None = None
    asked: tuple[float, ...] = ()  # as in the recipe, where there is no limit


@dataclass(frozen=True)
class Costs:
    """Counts the multiply-accumulates for one input, the parameters, and the units ("channels") of a model."""

    macs: int
    params: int
    channels: int


@dataclass(frozen=True)
class Started(Event):
    """The model was analysed, and the target can be met."""

    kind: ClassVar[str] = "start"
    arch: str | None
    device: str
    precision: str
    stages: tuple[StagePlan, ...]
    round_to: int
    target: Wanted
    dense: Costs


@dataclass(frozen=True)
class Resumed(Event):
    """The run continues from a checkpoint. before: steps of all stages that are over."""

    kind: ClassVar[str] = "resumed"
    stage: str
    step: int
    path: str
    before: int


@dataclass(frozen=True)
class StageBegan(Event):
    """A stage of training starts or continues."""

    kind: ClassVar[str] = "stage"
    name: str


@dataclass(frozen=True)
class StepTaken(Event):
    """One training step is done. step: number of finished steps, of the `steps` in the stage."""

    kind: ClassVar[str] = "step"
    stage: str
    step: int
    steps: int
    epoch: int
    epochs: int


@dataclass(frozen=True)
class EpochEnded(Event):
    """An epoch is over. lr: learning rate of its last step. waiting_for_data: fraction of the epoch's time."""

    kind: ClassVar[str] = "epoch"
    is_logged: ClassVar[bool] = True
    stage: str
    epoch: int
    epochs: int
    step: int
    loss: float
    validation_accuracy: float | None  # percent
    lr: float
    images_per_second: float
    waiting_for_data: float
    seconds: float


@dataclass(frozen=True)
class RoundStarted(Event):
    """Units were chosen and start to decay.

    rounds: number of planned rounds; a further round replaces released units. condemning: units are chosen step by step
    during the round, as soon as the base pruner marks them.
    """

    kind: ClassVar[str] = "round"
    is_logged: ClassVar[bool] = True
    stage: str
    step: int
    round: int
    rounds: int
    chosen: int
    condemning: bool
    limit: int
    predicted_macs: int
    predicted_params: int


@dataclass(frozen=True)
class UnitsWatched(Event):
    """Some look at the units during a round.

    released, removed: since the beginning of the run. norms: of some units of the round, as a fraction of what they
    were when their decay began, by their number in the dense model; `freed` names those of them that were released.
    """

    kind: ClassVar[str] = "units"
    is_logged: ClassVar[bool] = True
    stage: str
    step: int
    round: int
    decaying: int
    dead: int
    released: int
    removed: int
    norms: dict[str, float]
    freed: tuple[str, ...]


@dataclass(frozen=True)
class UnitsRemoved(Event):
    """Dead units were physically removed. macs, params, units: counts after the removal."""

    kind: ClassVar[str] = "compact"
    is_logged: ClassVar[bool] = True
    stage: str
    round: int
    step: int
    removed: int
    released: int
    macs: int
    params: int
    units: int
    difference: float  # largest relative difference between outputs before and after


@dataclass(frozen=True)
class WentBack(Event):
    """The accuracy floor was broken, so the run continues from the last state that held it."""

    kind: ClassVar[str] = "back"
    is_logged: ClassVar[bool] = True
    stage: str
    step: int
    culprit: str
    validation_accuracy: float | None
    floor: float
    macs: int
    params: int
    units: int


@dataclass(frozen=True)
class WeightsCut(Event):
    """Single weights of the trained model were cut to a sparsity. Accuracies are in percent, on the test set.

    dense: of the trained model, before the cut.
    """

    kind: ClassVar[str] = "cut"
    is_logged: ClassVar[bool] = True
    asked: float
    reached: float
    bytes: int
    dense: float | None
    cut: float | None
    recovered: float | None
    recalibrated: float | None
    file: str


@dataclass(frozen=True)
class Exported(Event):
    """A file was exported, reloaded and compared."""

    kind: ClassVar[str] = "export"
    is_logged: ClassVar[bool] = True
    format: str
    path: str
    max_difference: float


@dataclass(frozen=True)
class PhaseBegan(Event):
    """A phase without steps starts, which may take a while: loading, analysing, exporting or measuring.

    name: one short word. what: what is done, as a clause: "measuring the dense model".
    """

    kind: ClassVar[str] = "phase"
    name: str
    what: str


@dataclass(frozen=True)
class FilesDecoded(Event):
    """Image files are being decoded into memory. split: training or test."""

    kind: ClassVar[str] = "decoded"
    split: str
    decoded: int
    files: int


@dataclass(frozen=True)
class Mistaken(Event):
    """The slim model gets this test image wrong, the dense one right.

    image: its number in the test set, if all of that can be read. label: what it shows. slim: what the slim model says.
    picture: a data URL.
    """

    kind: ClassVar[str] = "mistake"
    is_logged: ClassVar[bool] = True
    image: int
    label: str
    slim: str
    dense_confidence: float
    slim_confidence: float
    picture: str


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """A checkpoint was written; the run can be resumed from this step."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str


@dataclass(frozen=True)
class Note(Event):
    """Tells the user something in one sentence."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Done(Event):
    """All files are written."""

    kind: ClassVar[str] = "done"

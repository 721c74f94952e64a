"""Define what the jobs return besides a `Report`. `to_dict` gives what the command line prints with --json."""

from dataclasses import asdict, dataclass, field
from typing import Any

from dpm_cli.report import KeptLayer, Milliseconds, Width


@dataclass(frozen=True)
class Trained:
    """Describes a dense model that was trained and saved. Accuracies are in percent."""

    path: str
    arch: str
    accuracy: float  # on the test set, like the loss
    loss: float
    validation_accuracy: float | None  # after the last epoch
    epochs: int
    params: int
    bytes: int  # of the file
    seconds: float
    seed: int
    device: str
    precision: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class BatchMilliseconds(Milliseconds):
    """Holds the latency of one call with a batch of images."""

    batch: int = 1


@dataclass(frozen=True)
class Evaluated:
    """Describes a model file that was measured. Accuracy is in percent; latencies are per runtime, on the CPU."""

    file: str
    kind: str  # dense | slim | the format of an exported file
    bytes: int  # size of the weights, or of the exported file
    accuracy: float | None  # on the test set, like the loss
    loss: float | None
    images: int  # number of images that the accuracy is measured on
    unreadable: int  # number of images that were skipped
    macs: int | None = None  # unknown if a foreign ONNX file does not tell all shapes
    params: int | None = None  # of an ONNX file: the weights in it, into which exporters fold BatchNorm
    odd_widths: dict[str, int] | None = None  # slim widths that are not multiples of 8; None for exported files
    latency: dict[str, Milliseconds] = field(default_factory=dict)
    latency_in_batches: dict[str, BatchMilliseconds] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        in_order = ("file", "macs", "params", "kind", "bytes", "odd_widths")
        result = {key: values.pop(key) for key in in_order} | values
        if self.odd_widths is None:
            del result["odd_widths"]
        if not self.latency_in_batches:
            del result["latency_in_batches"]
        return result


@dataclass(frozen=True)
class Found:
    """Describes a file that a run wrote, or that bears the name of one."""

    name: str
    bytes: int
    state: str  # whole | damaged | foreign: without the mark of a run | leftover of a killed process
    what: str  # in a few words


@dataclass(frozen=True)
class Examined:
    """Describes the folder of a run or of trainings: what is in it, and what to do next."""

    folder: str
    state: str  # empty | finished | unfinished | begun: nothing was saved yet | busy | broken
    files: tuple[Found, ...]
    others: int  # files and folders that no run touches
    advice: tuple[str, ...]  # one sentence each, with the commands
    problem: str | None  # why a run would be refused here, or what is damaged, and the way out

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Guess:
    """Names a class that a picture may show."""

    name: str  # the index, if the file holds no names
    index: int
    probability: float


@dataclass(frozen=True)
class Predicted:
    """Holds the most probable classes of a picture, best first."""

    image: str
    classes: tuple[Guess, ...]
    error: str | None = None  # why the picture cannot be read, so that there are no classes

    def to_dict(self) -> dict[str, Any]:
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        return {"image": self.image, "classes": [asdict(guess) for guess in self.classes]}


@dataclass(frozen=True)
class Benchmarked:
    """Holds the latency of one file in one runtime: median and quartiles of a warm call, in milliseconds."""

    file: str
    format: str
    bytes: int
    runtime: str
    batch: int
    threads: int
    median: float = 0.0
    low: float = 0.0
    high: float = 0.0
    processor: float = 0.0  # processor time of a call, lower quartile; it stands still while other programs run
    images_per_second: float = 0.0
    faster: float = 1.0  # than the first file at the same batch and threads; of one thread, by processor time
    doubt: str | None = None  # why the figure may be wrong

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PlannedGroup:
    """Describes a group of tied layers and its units."""

    name: str
    layers: tuple[str, ...]
    units: int
    lowest: int  # number of units that must stay
    planned: int | None = None  # number of units that would stay; None if the target cannot be met

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self) | {"layers": list(self.layers)}
        if self.planned is None:
            del values["planned"]
        return values


@dataclass(frozen=True)
class PlannedTarget:
    """Describes the target of the recipe, and whether the model can meet it."""

    kind: str  # macs | params | channels | size | latency, in nanoseconds | sparsity | drop
    asked: float  # as in the recipe: a fraction to keep, or an absolute number
    limit: int
    is_achievable: bool

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "asked": self.asked, "limit": self.limit, "achievable": self.is_achievable}


@dataclass(frozen=True)
class PlannedRun:
    """Counts the images of a run and what its schedule makes of them."""

    train: int
    validation: int
    test: int
    steps_per_epoch: int
    rounds: int  # 0 if single weights are cut
    decay_steps: int  # 1 cuts at once


@dataclass(frozen=True)
class GroupSensitivity:
    """Holds the accuracy and loss when only this group loses units. Tied layers are judged together."""

    group: str
    layers: tuple[str, ...]
    units: int
    removed: int
    accuracy: float  # percent
    loss: float
    macs_saved: float  # fraction of the dense model's

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers)}


@dataclass(frozen=True)
class Sensitivity:
    """Compares the accuracy without units of each group with that of the whole model."""

    share: float  # fraction of its units that each group loses
    split: str  # validation | train
    images: int
    accuracy: float  # percent
    loss: float
    groups: tuple[GroupSensitivity, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"groups": [group.to_dict() for group in self.groups]}


@dataclass(frozen=True)
class Inspected:
    """Holds the plan of a recipe for a model. Costs are keyed by macs, params and channels (number of units)."""

    arch: str | None
    dense: dict[str, int]
    lowest: dict[str, int]  # with as few units as the recipe allows
    round_to: int
    target: PlannedTarget
    groups: tuple[PlannedGroup, ...]
    kept: tuple[KeptLayer, ...]
    planned: dict[str, int] | None = None  # None if the target cannot be met, like the widths
    widths: tuple[Width, ...] | None = None
    sensitivity: Sensitivity | None = None
    code: dict[str, str] = field(default_factory=dict)  # setting -> code of the user's own that the recipe runs
    run: PlannedRun | None = None  # None if a problem keeps it from beginning
    problems: tuple[str, ...] = ()  # besides the target, what would keep a run from beginning
    exit_code: int = 0  # of the first problem

    def to_dict(self) -> dict[str, Any]:
        result: dict[str, Any] = {
            "arch": self.arch,
            "code": self.code,
            "run": None if self.run is None else asdict(self.run),
            "problems": list(self.problems),
            "dense": self.dense,
            "round_to": self.round_to,
            "achievable": {kind: [self.lowest[kind], dense] for kind, dense in self.dense.items()},
            "target": self.target.to_dict(),
            "groups": [group.to_dict() for group in self.groups],
            "kept": [asdict(layer) for layer in self.kept],
        }
        if self.planned is not None:
            result["planned"] = self.planned
        if self.widths is not None:
            result["widths"] = [asdict(width) for width in self.widths]
        if self.sensitivity is not None:
            result["sensitivity"] = self.sensitivity.to_dict()
        return result

"""What a run hands back: one `Report`, the same in Python, in report.json, in slim.pt and in the table."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

Event = dict[str, Any]  # one line of metrics.jsonl: {"event": "epoch" | "round" | "compact" | …, …}


@dataclass(frozen=True)
class Milliseconds:
    """Latency of one call with one image, warm: median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One network, dense or slim."""

    macs: int  # multiply-accumulates of one image
    params: int
    bytes: int  # of the saved weights
    accuracy: float | None  # percent, on the test set
    loss: float | None  # mean cross-entropy, on the test set
    latency: dict[str, Milliseconds]  # "torch", "onnxruntime"; batch 1


@dataclass(frozen=True)
class TargetReport:
    """What was asked and what was reached, both as the same kind of cost."""

    kind: str  # macs | params | channels
    asked: float  # as in the recipe: a fraction to keep, or an absolute number
    limit: int
    dense: int
    reached: int

    @property
    def is_met(self) -> bool:
        return self.reached <= self.limit


@dataclass(frozen=True)
class FloorReport:
    """The accuracy floor, on the validation images."""

    max_drop: float  # points
    dense: float  # percent, of the dense model
    limit: float  # percent
    is_broken: bool  # it kept the run from its target
    text: str | None  # what happened, if the run had to go back to an earlier state


@dataclass(frozen=True)
class UnitCounts:
    """What became of the units."""

    total: int
    chosen: int  # decays started
    released: int  # decays ended because training fought for the unit
    removed: int


@dataclass(frozen=True)
class Width:
    """Output channels of one layer."""

    layer: str
    before: int
    after: int


@dataclass(frozen=True)
class KeptLayer:
    """A layer whose outputs stayed whole, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class ExportedFile:
    """A file that was loaded again and compared with the slim model at batch 1 and 5."""

    format: str
    path: str
    bytes: int
    max_difference: float


@dataclass(frozen=True)
class SparsityReport:
    """A trained model with single weights cut. Accuracies are in percent, on the test set."""

    asked: float  # the share of weights to cut
    reached: float
    bytes: int  # of the weights, packed as in slim.pt
    dense: float | None  # before the cut
    cut: float | None  # with zeros
    recovered: float | None  # with what is remembered of the cut weights
    recalibrated: float | None  # and BatchNorm statistics anew, if the recipe asks for that
    file: str


@dataclass(frozen=True)
class Report:
    """Everything a run measured. Fractions are slim / dense."""

    # How pydantic reads this and all its parts.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    arch: str | None
    base: str
    method: str  # the base pruner with its variant, "+ DPM" if units decay
    dense: Measured
    slim: Measured
    target: TargetReport
    units: UnitCounts
    widths: list[Width]
    kept: list[KeptLayer]
    compact_difference: float  # largest relative difference of outputs before and after removal, in the run
    exports: list[ExportedFile]
    files: dict[str, str]  # "slim", "report", "recipe", "metrics" -> path
    seconds: dict[str, float]  # per stage
    seed: int
    device: str
    precision: str
    recipe_hash: str
    versions: dict[str, Any]  # and hardware
    validation_accuracy: float | None = None  # percent, of the slim model
    notes: list[str] = field(default_factory=list)  # what a user should know, one sentence each
    floor: FloorReport | None = None  # if the recipe sets prune.max_drop
    sparsities: list[SparsityReport] = field(default_factory=list)  # of the base on-the-fly; slim is the first

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"target": asdict(self.target) | {"met": self.target.is_met}}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` wrote. Raises ValueError with one short line if it is something else."""
        try:
            values = json.loads(text)
            del values["target"]["met"]
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        # Names of files may hold bytes that are no text, which pydantic's JSON parser refuses: they become "?".
        return _parse(json.dumps(values, ensure_ascii=False).encode(errors="replace"))


def _parse(text: bytes) -> Report:
    """Every field holds what it is declared to hold. Raises ValueError that names the first that does not."""
    from pydantic import TypeAdapter, ValidationError  # a third of the time of `dpm --help`, which imports this file

    try:
        return TypeAdapter(Report).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("report", *first["loc"])))[:100]
        raise ValueError(f"{place!r} is {str(first['input'])[:40]!r}: {first['msg']}") from None

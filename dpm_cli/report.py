"""What a run hands back: one `Report`, the same in Python, in report.json, in slim.pt and in the table."""

import json
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

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
        """Read what `to_json` wrote. Raises ValueError if it is something else."""
        try:
            report = cls._from_dict(json.loads(text))
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        _require_types(report, "report")
        return report

    @classmethod
    def _from_dict(cls, values: Any) -> "Report":
        target = {key: value for key, value in values["target"].items() if key != "met"}
        return cls(
            **{
                **values,
                "dense": _measured(values["dense"]),
                "slim": _measured(values["slim"]),
                "target": TargetReport(**target),
                "units": UnitCounts(**values["units"]),
                "widths": [Width(**width) for width in values["widths"]],
                "kept": [KeptLayer(**kept) for kept in values["kept"]],
                "exports": [ExportedFile(**made) for made in values["exports"]],
                "sparsities": [SparsityReport(**each) for each in values.get("sparsities", [])],
                "floor": FloorReport(**values["floor"]) if values.get("floor") else None,
            }
        )


def _require_types(value: Any, place: str) -> None:
    """Every field holds what it is declared to hold. Raises ValueError that names the first that does not."""
    for name, kind in get_type_hints(type(value)).items():
        field_value, field_place = getattr(value, name), f"{place}.{name}"
        if not _is(field_value, kind):
            raise ValueError(f"{field_place} is {str(field_value)[:40]!r}")
        entries = field_value.values() if isinstance(field_value, dict) else field_value
        for entry in entries if isinstance(entries, list | type({}.values())) else [field_value]:
            if is_dataclass(entry):
                _require_types(entry, field_place)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a declared type: a class, a union of them, a list or a dict of one."""
    arguments = get_args(kind)
    match get_origin(kind):
        case None:
            numbers = (int, float) if kind is float else (kind,)
            return kind is Any or (isinstance(value, numbers) and not (kind is not bool and isinstance(value, bool)))
        case origin if origin is list:
            return isinstance(value, list) and all(_is(entry, arguments[0]) for entry in value)
        case origin if origin is dict:
            return isinstance(value, dict) and all(_is(entry, arguments[1]) for entry in value.values())
        case _:
            return any(_is(value, argument) for argument in arguments)


def _measured(values: dict[str, Any]) -> Measured:
    latency = {name: Milliseconds(**latency) for name, latency in values["latency"].items()}
    return Measured(**{**values, "latency": latency})

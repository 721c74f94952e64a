"""Describe the result of a run: one `Report`, the same in Python, report.json, slim.pt and the table."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Milliseconds:
    """Holds the median and quartiles of the latency of one warm call with one image."""

    median: float
    low: float
    high: float
    threads: int | None = None  # of torch and ONNX Runtime
    doubt: str | None = None  # why the figure may be wrong: a busy machine, a wide spread


@dataclass(frozen=True)
class Measured:
    """Holds what was measured of one network, dense or slim."""

    macs: int  # multiply-accumulates for one image
    params: int
    bytes: int  # of the saved state dict: parameters and buffers
    accuracy: float | None  # percent, on the test set
    loss: float | None  # mean cross-entropy, on the test set
    latency: dict[str, Milliseconds]  # "torch", "onnxruntime"; batch 1
    onnx_bytes: int | None = None  # of the float32 ONNX file


@dataclass(frozen=True)
class TargetReport:
    """Compares the requested cost with the cost that was reached, in the same unit."""

    kind: str  # macs | params | channels | size | latency, in nanoseconds | sparsity | drop, whose cost is in MACs
    asked: float  # as in the recipe: a fraction to keep, an absolute number, or points
    limit: int
    dense: int
    reached: int

    @property
    def is_met(self) -> bool:
        """Tell whether the cost is within its limit; of a drop, which limits none, whether it fell at all."""
        return self.reached < self.dense if self.kind == "drop" else self.reached <= self.limit


@dataclass(frozen=True)
class FloorReport:
    """Tells whether the accuracy floor held on the validation images."""

    max_drop: float  # points
    dense: float  # percent, of the dense model
    limit: float  # percent
    is_broken: bool  # the floor kept the run from reaching its target
    text: str | None  # why the run returned to an earlier state, if it did


@dataclass(frozen=True)
class UnitCounts:
    """Counts what happened to the units."""

    total: int
    chosen: int  # times a decay started
    released: int  # times a decay ended because training fought for the unit
    removed: int


@dataclass(frozen=True)
class Width:
    """Holds the number of output channels of one layer."""

    layer: str
    before: int
    after: int


@dataclass(frozen=True)
class KeptLayer:
    """Names a layer whose outputs all stayed, and the reason."""

    layer: str
    reason: str
    macs: int = 0  # of one input, in the dense model


@dataclass(frozen=True)
class ExportedFile:
    """Describes an exported file that was reloaded and compared with the slim model at batch 1 and 5."""

    format: str
    path: str
    bytes: int
    max_difference: float
    runtime: str | None = None  # where its own accuracy and latency were measured; None if they were not
    accuracy: float | None = None  # percent, on the test set
    latency: Milliseconds | None = None  # batch 1, on the CPU
    agreement: float | None = None  # int8: percent of validation images with the same answer as in float32
    drop: float | None = None  # int8: points of validation accuracy lost
    kept: list[str] = field(default_factory=list)  # int8: layers that stayed in float32


@dataclass(frozen=True)
class SparsityReport:
    """Describes a trained model after single weights were cut. Accuracies are in percent, on the test set."""

    asked: float  # share of weights to cut
    reached: float
    bytes: int  # of the weights, packed as in slim.pt
    dense: float | None  # of the trained model, before the cut
    cut: float | None  # with zeros
    recovered: float | None  # with recovered values in place of the cut weights
    recalibrated: float | None  # and with recomputed BatchNorm statistics, if the recipe asks for them
    file: str


@dataclass(frozen=True)
class Report:
    """Holds everything a run measured. Fractions are slim / dense."""

    # Tells pydantic how to read this class and all its parts.
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
    compact_difference: float  # largest relative difference between outputs before and after a removal
    exports: list[ExportedFile]
    files: dict[str, str]  # "slim", "report", "recipe", "metrics" -> path
    seconds: dict[str, float]  # per stage
    seed: int
    device: str
    precision: str
    recipe_hash: str
    versions: dict[str, Any]  # hardware too
    validation_accuracy: float | None = None  # percent, of the slim model
    notes: list[str] = field(default_factory=list)  # what a user should know, one sentence each
    floor: FloorReport | None = None  # if the recipe sets prune.max_drop or target.drop
    targets: list[TargetReport] = field(default_factory=list)  # all, if there are several
    sparsities: list[SparsityReport] = field(
        default_factory=list
    )  # only for the base on-the-fly; the first one is the slim model
    origin: str | None = None  # digest of the weights that the run started from; None if an older version wrote this

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"target": asdict(self.target) | {"met": self.target.is_met}}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` wrote. Raises ValueError with one short line if the text is anything else."""
        try:
            values = json.loads(text)
            del values["target"]["met"]
        except RecursionError:
            raise ValueError("nested too deeply") from None
        except (KeyError, TypeError):
            raise ValueError("it has no target") from None
        # File names may hold bytes that are not text. pydantic's JSON parser refuses them, so they become "?".
        return _parse(json.dumps(values, ensure_ascii=False).encode(errors="replace"))


def _parse(text: bytes) -> Report:
    """Check the type of every field. Raises ValueError that names the first wrong one."""
    from pydantic import TypeAdapter, ValidationError  # imported here: it would slow `dpm --help`

    try:
        return TypeAdapter(Report).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("report", *first["loc"])))[:100]
        raise ValueError(f"{place!r} is {str(first['input'])[:40]!r}: {first['msg']}") from None

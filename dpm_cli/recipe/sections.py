"""Define the sections of a recipe: frozen settings, checked once, each passed to the object that needs it."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, le=10**12)]
NonNegative = Annotated[int, Field(ge=0, le=10**12)]
Side = Annotated[int, Field(ge=1, le=8192)]
LearningRate = Annotated[float, Field(gt=0, le=100)]
ExportFormat = Literal["torchscript", "onnx", "onnx-fp16", "pt2"]

MAX_NUMBERS = 1 << 22  # limit per image: a typo must not fill the memory
SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


class Section(BaseModel):
    """All sections derive from this. Unknown keys are errors, and settings never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def parse_amount(value: object) -> float:
    """Read a kept fraction in (0, 1) or an absolute number such as 60000000, "60M" or "1.2G"."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGBkmgb]?)\s*", value)):
        value = float(match[1]) * SUFFIXES.get(match[2].upper(), 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError("must be a fraction to keep such as 0.47, or an absolute such as 60M")
    if 1 <= value < 2:
        raise ValueError(f"{value} keeps everything: a fraction to keep lies below 1, an absolute is 2 or more")
    return float(value)


Amount = Annotated[float, BeforeValidator(parse_amount)]


def parse_step(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= 10**6):
        return value
    raise ValueError("must be a number of channels such as 8, or auto")


Step = Annotated[int | Literal["auto"], BeforeValidator(parse_step)]


class Model(Section):
    """Names the architecture: built-in | torchvision:NAME | timm:NAME | package.module:function."""

    arch: str
    classes: int = Field(default=10, ge=1, le=10**5)
    input: tuple[Side, Side, Side] = (3, 32, 32)  # one image: channels, height, width

    @field_validator("input")
    @classmethod
    def _fits_memory(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if math.prod(value) > MAX_NUMBERS:
            raise ValueError(f"one image of {list(value)} holds more than {MAX_NUMBERS} numbers")
        return value


class Augment(Section):
    """Controls random changes of training images, which depend only on (seed, epoch, index)."""

    crop: NonNegative = 4  # pixels of zero padding before a random crop back to size; 0 turns it off
    flip: bool = True  # flip randomly from left to right
    cutout: NonNegative = 0  # side of the zeroed square in pixels; 0 turns it off
    resized_crop: bool = False  # crop a random area and aspect ratio, for larger images


class Data(Section):
    """Names a dataset (digits | cifar10 | cifar100 | fashion-mnist | folder) and how to load it."""

    name: Literal["digits", "cifar10", "cifar100", "fashion-mnist", "folder"]
    root: Path = Path("data")
    batch: Positive = 128
    validation: float = Field(default=0.1, ge=0, lt=1)  # fraction of the training images held out for all decisions
    augment: Augment = Augment()
    mean: tuple[float, ...] | None = None  # per channel, of pixels in [0, 1]; default: of the dataset
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    workers: NonNegative = 2  # number of processes that decode images which do not fit in memory
    memory_limit: Positive = 2**31  # bytes of decoded images kept in memory; larger folders are streamed
    max_corrupt: NonNegative = 0  # folder: maximum number of unreadable images to skip
    download: bool = True
    limit: Positive | None = None  # use only this many training images (a seeded subset)
    labels: bool = True  # false: accept any folder of images; train nothing, measure no accuracy


def parse_sparsities(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


Sparsity = Annotated[float, Field(gt=0, lt=1)]
Sparsities = Annotated[tuple[Sparsity, ...], BeforeValidator(parse_sparsities), Field(min_length=1, max_length=20)]


class Target(Section):
    """Sets how small the model must become.

    Give exactly one of macs, params and channels, as a kept fraction or an absolute number. For the base `on-the-fly`
    give `sparsity`: the share of weights to cut, or several shares of which training aims at the first.
    """

    macs: Amount | None = None
    params: Amount | None = None
    channels: Amount | None = None
    sparsity: Sparsities | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "Target":
        if sum(value is not None for value in (self.macs, self.params, self.channels, self.sparsity)) != 1:
            raise ValueError("name exactly one of macs, params, channels, or sparsity for the base on-the-fly")
        return self

    @property
    def kind(self) -> Literal["macs", "params", "channels"]:
        """Name the cost that limits the remaining units."""
        return "macs" if self.macs is not None else "params" if self.params is not None else "channels"

    @property
    def amount(self) -> float:
        """Return the target: a kept fraction if below 1, else an absolute number."""
        amount = getattr(self, self.kind)
        assert isinstance(amount, float)
        return amount


class Otov2(Section):
    """Configures the base `otov2`. `amplify` and `ceiling` default to the reference's values for the optimizer."""

    variant: Literal["dhspg", "hesso"] = "dhspg"
    strength: float | None = Field(default=None, gt=0, le=1e4)  # of the penalty; default: from the round's length
    amplify: float | None = Field(default=None, gt=0, le=1e6)  # × the penalty a growing unit needs; default: 2 or 20
    ceiling: float | None = Field(default=None, ge=1, le=1e9)  # largest penalty / `strength`; default: 10 or 1000
    epsilon: float = Field(default=0.95, ge=0, lt=1)  # project a unit if less than this is left along its direction
    tolerance: Fraction = 0.05  # fraction of all units to mark beyond what the target needs


class Gates(Section):
    """Configures the base `gate-decorator`. `prune.rounds` is the number of ticks; `train` describes one tock."""

    tick_epochs: Positive = 1
    tick_lr: LearningRate = 1e-3
    ticks_per_tock: Positive = 10
    strength: float = Field(default=1e-3, ge=0, le=100)  # of the L1 penalty on gates during tocks
    fraction: float | None = Field(default=None, gt=0, lt=1)  # of gates per tick; default: equal shares of the target


class OnTheFly(Section):
    """Configures the base `on-the-fly`, which cuts single weights. `prune.keep` names the layers to spare."""

    penalty: Literal["ternary-cosine", "tail-energy"] = "ternary-cosine"
    strength: float = Field(default=2.0, ge=0, le=100)  # of the penalty, summed over the layers
    per: Literal["filter", "layer"] = "filter"  # which weights share a sphere and a mean
    keep_first: bool = True  # do not cut the first convolution
    threshold: float | None = Field(default=None, gt=0, le=100)  # cut weights below threshold × RMS, not to a share
    recover: Literal["none", "mean", "signed-mean", "split-mean"] = "split-mean"  # what replaces cut weights


class Prune(Section):
    """Sets which units are removed, and when."""

    base: Literal["depgraph", "otov2", "gate-decorator", "on-the-fly"] = "depgraph"
    importance: Literal["group-norm", "l1", "bn-scale", "taylor", "mixed", "random"] = "group-norm"  # depgraph
    observe_steps: Positive = 50  # taylor, mixed: training steps to average over
    penalty: Literal["group-norm", "slimming", "growing", "channel-polar"] = (
        "group-norm"  # depgraph: during sparse learning
    )
    otov2: Otov2 = Otov2()
    gates: Gates = Gates()
    on_the_fly: OnTheFly = OnTheFly()
    target: Target
    rounds: Annotated[int, Field(ge=1, le=10_000)] = 5
    start: Fraction = 0.0  # fraction of the train stage at which the first round starts
    end: Fraction = 0.5  # fraction of the train stage at which the last planned round is finished
    round_to: Step = "auto"  # surviving widths are multiples of this; auto means 8, or less if the target needs it
    min_keep: Fraction = 0.1  # fraction of every group that must stay; at least one unit
    keep: tuple[str, ...] = ()  # layers that keep all outputs: names or patterns such as "layer4.*"
    embedding: Literal["keep", "prune"] = "keep"  # transformers: the width of the tokens in all blocks
    normalizer: Literal["mean", "max"] | None = None  # of importances; default: max with sparse learning, else mean
    sparse_epochs: NonNegative = 0  # epochs of sparse learning before the first round
    sparse_strength: float = Field(default=5e-4, ge=0, le=100)
    sparse_growth: float = Field(default=1e-5, ge=0, le=100)  # penalty growing: added to the strength per epoch
    sparse_lr: LearningRate = 0.01
    max_drop: float | None = Field(default=None, ge=0, le=100)  # points of validation accuracy; default: no floor

    @model_validator(mode="after")
    def _means_something_to_its_base(self) -> "Prune":
        for name in ("importance", "penalty", "sparse_epochs"):
            if self.base != "depgraph" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is a setting of the base depgraph and would change nothing in {self.base}")
        return self

    @model_validator(mode="after")
    def _aims_at_what_the_base_cuts(self) -> "Prune":
        if (self.base == "on-the-fly") != (self.target.sparsity is not None):
            raise ValueError("base on-the-fly cuts weights to a target.sparsity, the others units to macs or such")
        return self

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> "Prune":
        if self.start >= self.end:
            raise ValueError(f"start ({self.start}) must lie before end ({self.end})")
        return self


class Rectify(Section):
    """Sets when a decaying unit is released. The paper names the criteria; the formulas are ours."""

    # significance: `rate` counts standard errors of the mean outward direction over the decay so far
    criterion: Literal["significance", "cosine", "norm_per_update", "norm_per_decay", "norm_relative"] = "significance"
    rate: float = 2.0  # T_rate; default for the other criteria: 0.2
    length: float = 1.0  # T_len
    combine: Literal["and", "or"] = "and"
    smoothing: float = Field(default=0.9, ge=0, lt=1)  # of both criteria over the steps; 0 judges each step alone
    start: Fraction = 0.3  # fraction of the decay before which no unit is judged
    hits: Positive = 1  # number of consecutive steps for which the criteria must hold
    limit: NonNegative = 1  # maximum number of releases per unit

    @model_validator(mode="before")
    @classmethod
    def _rate_of_its_criterion(cls, values: Any) -> Any:
        is_left_out = isinstance(values, dict) and "rate" not in values
        if is_left_out and values.get("criterion", "significance") != "significance":
            return values | {"rate": 0.2}
        return values


class Decay(Section):
    """Configures Smooth Pruning. With `steps: 1` and `rectify: false` only the base pruner acts."""

    steps: Positive = 200  # optimizer steps until a unit is zero
    envelope: Literal["exact", "shrink-only", "multiplicative"] = "exact"  # multiplicative: HESSO's
    rectify: Rectify | None = Rectify()

    @field_validator("rectify", mode="before")
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        return None if value is False else {} if value is True else value


class Compact(Section):
    """Sets what happens to the mean outputs of units that are cut at once instead of decaying."""

    fold_mean: bool | None = None  # into the layers that read them; default: when no training follows
    fold_batches: Positive = 20  # training batches to measure the means on; no labels are needed


class Training(Section):
    """Configures one stage of training."""

    epochs: NonNegative = 20
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: LearningRate = 0.05
    momentum: float = Field(default=0.9, ge=0, lt=1)  # sgd
    nesterov: bool = False
    schedule: Literal["cosine", "step", "multistep", "triangular", "constant"] = "cosine"
    milestones: tuple[Fraction, ...] = (0.6, 0.8)  # multistep: fractions of the stage
    step_size: Positive = 30  # step: epochs
    gamma: float = Field(default=0.1, gt=0, le=1)  # step, multistep
    warmup_epochs: float = Field(default=0, ge=0)
    weight_decay: float = Field(default=5e-4, ge=0)
    label_smoothing: float = Field(default=0, ge=0, lt=1)
    mixup: float = Field(default=0, ge=0)  # alpha of the Beta distribution; 0 turns it off
    clip_grad: float | None = Field(default=None, gt=0)  # global L2 norm
    distill: Fraction = 0.0  # weight of the dense model's softened outputs in the loss
    temperature: float = Field(default=4.0, gt=0)  # of distillation

    @model_validator(mode="after")
    def _has_room(self) -> "Training":
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be fewer than epochs ({self.epochs})")
        return self


class Checkpoint(Section):
    """Sets how much work an interruption may lose."""

    every: Positive = 500  # steps between checkpoints


def default_decay(base: object, decay: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `decay`, with `rectify` off for otov2 unless it is set.

    Released units cost accuracy there (benchmarks/RESULTS.md).
    """
    return decay | {"rectify": False} if base == "otov2" and "rectify" not in decay else decay

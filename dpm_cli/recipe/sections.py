"""The sections of a recipe: frozen values that are checked once, and handed to the one object that needs them."""

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

MAX_NUMBERS = 1 << 22  # of one image; larger ones than any classifier's would only fill the memory
SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors; values are never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def parse_amount(value: object) -> float:
    """A kept fraction in (0, 1), or an absolute number: 60000000, "60M", "1.2G"."""
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
    """The architecture: built-in | torchvision:NAME | timm:NAME | package.module:function."""

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
    """Random changes of training images, drawn from (seed, epoch, index) alone."""

    crop: NonNegative = 4  # zero padding in pixels, then a random crop back to size; 0: none
    flip: bool = True  # left and right
    cutout: NonNegative = 0  # side of the zeroed square in pixels; 0: none
    resized_crop: bool = False  # random area and aspect ratio, for larger images


class Data(Section):
    """A dataset: digits | cifar10 | cifar100 | fashion-mnist | folder."""

    name: Literal["digits", "cifar10", "cifar100", "fashion-mnist", "folder"]
    root: Path = Path("data")
    batch: Positive = 128
    validation: float = Field(default=0.1, ge=0, lt=1)  # fraction of the training images held out for every decision
    augment: Augment = Augment()
    mean: tuple[float, ...] | None = None  # per channel, of pixels in [0, 1]; none: the dataset's own
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    workers: NonNegative = 2  # processes that decode images which do not fit in memory
    memory_limit: Positive = 2**31  # bytes of decoded images kept in memory; larger folders are streamed
    max_corrupt: NonNegative = 0  # folder: so many unreadable images are left out; one more stops the run
    download: bool = True
    limit: Positive | None = None  # use only this many training images (a seeded subset)
    labels: bool = True  # false: any folder of images serves; nothing is trained, no accuracy is measured


def parse_sparsities(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


Sparsity = Annotated[float, Field(gt=0, lt=1)]
Sparsities = Annotated[tuple[Sparsity, ...], BeforeValidator(parse_sparsities), Field(min_length=1, max_length=20)]


class Target(Section):
    """What must be left: exactly one of the first three, a kept fraction or an absolute number; for the base
    `on-the-fly` what must go instead: one share of the weights, or several from one training that aims at the first.
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
        """Of the units that are removed."""
        return "macs" if self.macs is not None else "params" if self.params is not None else "channels"

    @property
    def amount(self) -> float:
        """A kept fraction if below 1, else an absolute number."""
        amount = getattr(self, self.kind)
        assert isinstance(amount, float)
        return amount


class Otov2(Section):
    """The base `otov2`. Left out, `amplify` and `ceiling` are the reference's for the optimizer of `train`."""

    variant: Literal["dhspg", "hesso"] = "dhspg"
    strength: float | None = Field(default=None, gt=0, le=1e4)  # of the penalty (the reference: 1e-3); none: by length
    amplify: float | None = Field(default=None, gt=0, le=1e6)  # of what a unit that grows needs; none: 2, 20
    ceiling: float | None = Field(default=None, ge=1, le=1e9)  # largest penalty over `strength`; none: 10, 1000
    epsilon: float = Field(default=0.95, ge=0, lt=1)  # a unit is projected when less of it is left along itself
    tolerance: Fraction = 0.05  # of all units marked as redundant beyond what the target needs


class Gates(Section):
    """The base `gate-decorator`. `prune.rounds` is the number of ticks, `train` one tock."""

    tick_epochs: Positive = 1
    tick_lr: LearningRate = 1e-3
    ticks_per_tock: Positive = 10
    strength: float = Field(default=1e-3, ge=0, le=100)  # of the L1 penalty on gates in tocks
    fraction: float | None = Field(default=None, gt=0, lt=1)  # of the gates, per tick; none: equal shares of the target


class OnTheFly(Section):
    """The base `on-the-fly`, which cuts single weights. `train` is its training; `prune.keep` names layers to spare."""

    penalty: Literal["ternary-cosine", "tail-energy"] = "ternary-cosine"
    strength: float = Field(default=2.0, ge=0, le=100)  # of the penalty, summed over the layers
    per: Literal["filter", "layer"] = "filter"  # what lies on a sphere, and what shares a mean
    keep_first: bool = True  # the first convolution stays whole
    threshold: float | None = Field(default=None, gt=0, le=100)  # cut below so many root mean squares, not to a share
    recover: Literal["none", "mean", "signed-mean", "split-mean"] = "split-mean"  # in the place of what was cut


class Prune(Section):
    """Which units go, and when."""

    base: Literal["depgraph", "otov2", "gate-decorator", "on-the-fly"] = "depgraph"
    importance: Literal["group-norm", "l1", "bn-scale", "taylor", "mixed", "random"] = "group-norm"  # depgraph
    observe_steps: Positive = 50  # taylor, mixed: training steps to average over before the first round
    penalty: Literal["group-norm", "slimming", "growing", "channel-polar"] = (
        "group-norm"  # depgraph: in sparse learning
    )
    otov2: Otov2 = Otov2()
    gates: Gates = Gates()
    on_the_fly: OnTheFly = OnTheFly()
    target: Target
    rounds: Annotated[int, Field(ge=1, le=10_000)] = 5
    start: Fraction = 0.0  # of the train stage: the first round
    end: Fraction = 0.5  # of the train stage: the last planned round is finished
    round_to: Step = "auto"  # surviving widths are multiples of this; auto: 8, or less if the target needs it
    min_keep: Fraction = 0.1  # of every group; never less than one unit
    keep: tuple[str, ...] = ()  # layers whose outputs stay whole: names or patterns such as "layer4.*"
    embedding: Literal["keep", "prune"] = "keep"  # of transformers: the width of tokens, through all blocks
    normalizer: Literal["mean", "max"] | None = None  # of importances; none: max with sparse learning, else mean
    sparse_epochs: NonNegative = 0  # sparse learning before the first round
    sparse_strength: float = Field(default=5e-4, ge=0, le=100)
    sparse_growth: float = Field(default=1e-5, ge=0, le=100)  # penalty growing: added to the strength each epoch
    sparse_lr: LearningRate = 0.01
    max_drop: float | None = Field(default=None, ge=0, le=100)  # points of validation accuracy; none: no floor

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
    """When a decaying unit is released. The paper names the criteria; their closed forms are ours and selectable."""

    # significance: `rate` counts standard errors of the mean outward direction over the decay so far
    criterion: Literal["significance", "cosine", "norm_per_update", "norm_per_decay", "norm_relative"] = "significance"
    rate: float = 2.0  # T_rate; left out: 0.2 for the other criteria
    length: float = 1.0  # T_len
    combine: Literal["and", "or"] = "and"
    smoothing: float = Field(default=0.9, ge=0, lt=1)  # of both criteria over the steps; 0: each step alone
    start: Fraction = 0.3  # of the decay: not judged before
    hits: Positive = 1  # steps in a row that both criteria must hold
    limit: NonNegative = 1  # releases per unit

    @model_validator(mode="before")
    @classmethod
    def _rate_of_its_criterion(cls, values: Any) -> Any:
        is_left_out = isinstance(values, dict) and "rate" not in values
        if is_left_out and values.get("criterion", "significance") != "significance":
            return values | {"rate": 0.2}
        return values


class Decay(Section):
    """Smooth Pruning: N optimizer steps to zero. `steps: 1` with `rectify: false` is the base pruner."""

    steps: Positive = 200
    envelope: Literal["exact", "shrink-only", "multiplicative"] = "exact"  # multiplicative: HESSO's
    rectify: Rectify | None = Rectify()

    @field_validator("rectify", mode="before")
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        return None if value is False else {} if value is True else value


class Compact(Section):
    """What happens to the means of removed units, when these are cut at once rather than decay."""

    fold_mean: bool | None = None  # into the layers that read them; none: when no training follows
    fold_batches: Positive = 20  # of training images, to measure the means; no labels are needed


class Training(Section):
    """One stage of training."""

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
    mixup: float = Field(default=0, ge=0)  # alpha of the Beta distribution; 0: off
    clip_grad: float | None = Field(default=None, gt=0)  # global L2 norm
    distill: Fraction = 0.0  # weight of the dense model's softened outputs in the loss
    temperature: float = Field(default=4.0, gt=0)  # of distillation

    @model_validator(mode="after")
    def _has_room(self) -> "Training":
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be fewer than epochs ({self.epochs})")
        return self


class Checkpoint(Section):
    """How much an interruption may cost."""

    every: Positive = 500  # steps


def default_decay(base: object, decay: dict[str, Any]) -> dict[str, Any]:
    """The settings of `decay`, with `rectify` off for otov2 where it is left out.

    Released units cost accuracy there (benchmarks/RESULTS.md).
    """
    return decay | {"rectify": False} if base == "otov2" and "rectify" not in decay else decay

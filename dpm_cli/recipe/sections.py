"""Define the sections of a recipe: frozen settings, checked once, each passed to the object that needs it.

Every field has a description, which `dpm schema`, editors and the comments of written recipes show.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dpm_cli.recipe.bases import Gates, OnTheFly, Otov2
from dpm_cli.recipe.deployment import Latency
from dpm_cli.recipe.values import (
    COST_KINDS,
    Amount,
    CostKind,
    Count,
    DataName,
    Fraction,
    LearningRate,
    NonNegative,
    Positive,
    RoundCount,
    Section,
    Side,
    Size,
    Sparsities,
    Step,
    Time,
)

MAX_NUMBERS = 1 << 22  # limit per image: a typo must not fill the memory
SHORT_SPAN, LONG_SPAN = 0.2, 0.5  # of the train stage: how long units are chosen where prune.end is null


class Model(Section):
    """Names the architecture."""

    arch: str = Field(description="a built-in name, torchvision:NAME, timm:NAME, or package.module:function")
    weights: str | None = Field(
        default=None,
        description="what to start from if no MODEL is given: torchvision:DEFAULT, timm:DEFAULT or a file",
    )
    classes: int = Field(default=10, ge=1, le=10**5, description="number of classes")
    input: tuple[Side, Side, Side] = Field(default=(3, 32, 32), description="one image: channels, height, width")

    @field_validator("input")
    @classmethod
    def _fits_memory(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if math.prod(value) > MAX_NUMBERS:
            raise ValueError(f"one image of {list(value)} holds more than {MAX_NUMBERS} numbers")
        return value


class Augment(Section):
    """Controls random changes of training images, which depend only on (seed, epoch, index)."""

    crop: NonNegative = Field(
        default=4, description="pixels of zero padding before a random crop back to size; 0: no crop"
    )
    flip: bool = Field(default=True, description="flip randomly from left to right")
    cutout: NonNegative = Field(default=0, description="side of the zeroed square in pixels; 0: none")
    resized_crop: bool = Field(default=False, description="crop a random area and aspect ratio, for larger images")


class Data(Section):
    """Names a dataset and how to load it."""

    name: DataName = Field(
        description="folder or csv for your own images; a known dataset; hf:NAME; package.module:function"
    )
    root: Path = Field(
        default=Path("data"), description="folder of the images, a CSV file, or where a known dataset is downloaded to"
    )
    batch: Positive = Field(default=128, description="images per optimizer step, over all processes together")
    validation: float = Field(
        default=0.1, ge=0, lt=1, description="fraction of the training images held out for all decisions"
    )
    augment: Augment = Field(default=Augment(), description="random changes of training images")
    mean: tuple[float, ...] | None = Field(
        default=None, description="per channel, of pixels in [0, 1]; null: of the dataset (folders: ImageNet's)"
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(default=None, description="per channel, as mean")
    resize: Side | None = Field(
        default=None,
        description="scale the short side of images to this before cropping, as torchvision (256 for an input of 224); "
        "null: as small as covers the input",
    )
    crop: Literal["center", "none"] = Field(
        default="center", description="none: squeeze whole images into the input, whatever their aspect"
    )
    workers: NonNegative = Field(default=2, description="processes that decode images which do not fit in memory")
    memory_limit: Positive = Field(
        default=2**31, description="bytes of decoded images kept in memory; larger folders stream"
    )
    max_corrupt: NonNegative = Field(default=0, description="folder: unreadable images to skip before the run stops")
    download: bool = Field(default=True, description="download a known dataset that is not in root")
    limit: Positive | None = Field(
        default=None, description="use only this many training images, a seeded subset; null: all"
    )
    labels: bool = Field(default=True, description="false: any folder of images will do; nothing is trained or scored")


class Target(Section):
    """Sets how small the model must become.

    Give one or several of macs, params, channels, size and latency, as a kept fraction or an absolute number: all must
    hold. Or give `drop`: the model then becomes as small as it gets. For the base `on-the-fly` give `sparsity`: the
    share of weights to cut, or several shares of which training aims at the first.
    """

    macs: Amount | None = Field(
        default=None, description="multiply-accumulates to keep: a fraction, or an absolute like 60M"
    )
    params: Amount | None = Field(default=None, description="parameters to keep: a fraction, or an absolute like 2M")
    channels: Amount | None = Field(default=None, description="units to keep: a fraction, or an absolute number")
    size: Size | None = Field(
        default=None,
        description="four bytes for each parameter: a fraction, or an absolute like 5MB; files hold a little more, "
        "such as the graph, and buffers (the statistics of BatchNorm)",
    )
    latency: Time | None = Field(
        default=None, description="time of one call as exported, measured here: a fraction, or an absolute like 12ms"
    )
    drop: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="points of validation accuracy that pruning may cost: rounds go on while it holds and wait "
        "while it does not; the last state that held is fine-tuned",
    )
    sparsity: Sparsities | None = Field(
        default=None, description="on-the-fly: the share of weights to cut, or several; training aims at the first"
    )

    @model_validator(mode="after")
    def _is_clear(self) -> "Target":
        if not self.limits and self.latency is None and self.drop is None and self.sparsity is None:
            raise ValueError("name macs, params, channels, size, latency or drop, or sparsity for the base on-the-fly")
        if self.sparsity is not None and (self.limits or self.latency is not None or self.drop is not None):
            raise ValueError("sparsity, for the base on-the-fly, excludes all other targets: leave one of them out")
        return self

    @property
    def limits(self) -> dict[CostKind, float]:
        """Return the limited costs but latency: a fraction to keep if below 1, else an absolute number."""
        amounts = {"macs": self.macs, "params": self.params, "channels": self.channels, "size": self.size}
        return {kind: amount for kind in COST_KINDS if (amount := amounts[kind]) is not None}


Importance = Literal["group-norm", "l1", "bn-scale", "taylor", "fisher", "random"]


class Prune(Section):
    """Sets which units are removed, and when."""

    base: Literal["depgraph", "otov2", "gate-decorator", "on-the-fly"] = Field(
        default="depgraph", description="the base pruner, which says which units are redundant"
    )
    importance: Importance = Field(default="group-norm", description="depgraph: what units are ranked by")
    observe_batches: Positive = Field(
        default=50, description="taylor, fisher: batches whose gradients are looked at before each round"
    )
    penalty: Literal["group-norm", "slimming", "growing", "channel-polar"] = Field(
        default="group-norm", description="depgraph: what pulls on weak units during sparse learning"
    )
    otov2: Otov2 = Field(default=Otov2(), description="settings of the base otov2")
    gates: Gates = Field(default=Gates(), description="settings of the base gate-decorator")
    on_the_fly: OnTheFly = Field(default=OnTheFly(), description="settings of the base on-the-fly")
    target: Target = Field(description="how small the model must become; all that are given must hold")
    latency: Latency = Field(default=Latency(), description="what target.latency is measured in")
    rounds: RoundCount = Field(
        default="auto", description="rounds in which units are chosen; auto: 5, or as many as fit"
    )
    start: Fraction = Field(default=0.0, description="fraction of the train stage at which the first round starts")
    end: Fraction | None = Field(
        default=None,
        description="fraction of the train stage at which the last planned round is finished; null: after a fifth of "
        "what follows `start`, or as many steps as `rounds` and `decay.steps` ask for (70 if auto), up to half; after "
        "half for target.drop and for bases other than depgraph",
    )
    round_to: Step = Field(
        default="auto", description="widths stay multiples of this; auto: 8, or less if the target needs it"
    )
    min_keep: Fraction = Field(
        default=0.1, description="fraction of every group that must stay; at least one unit does"
    )
    keep: tuple[str, ...] = Field(
        default=(), description="layers that keep all outputs: names or patterns such as layer4.*"
    )
    embedding: Literal["keep", "prune"] = Field(
        default="keep", description="transformers: whether the width of the tokens shrinks in all blocks"
    )
    normalizer: Literal["mean", "max"] | None = Field(
        default=None, description="of importances within a group; null: max with sparse learning, else mean"
    )
    sparse_epochs: NonNegative = Field(default=0, description="epochs of sparse learning before the first round")
    sparse_strength: float = Field(default=5e-4, ge=0, le=100, description="of the penalty during sparse learning")
    sparse_growth: float = Field(
        default=1e-5, ge=0, le=100, description="penalty growing: added to the strength every epoch"
    )
    sparse_lr: LearningRate = Field(default=0.01, description="learning rate of sparse learning")
    max_drop: float | None = Field(
        default=None, ge=0, le=100, description="points of validation accuracy that pruning may cost; null: no floor"
    )

    @model_validator(mode="after")
    def _means_something_to_its_base(self) -> "Prune":
        for name in ("importance", "penalty", "sparse_epochs"):
            if self.base != "depgraph" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is a setting of the base depgraph and would change nothing in {self.base}")
        return self

    @property
    def floor(self) -> float | None:
        """Return the points of validation accuracy that may be lost, by `max_drop` or as the target; None: any."""
        return self.target.drop if self.max_drop is None else self.max_drop

    @model_validator(mode="after")
    def _has_one_floor(self) -> "Prune":
        if self.target.drop is None:
            return self
        if self.max_drop is not None:
            raise ValueError("target.drop and max_drop both limit the loss of accuracy: leave one of them out")
        if self.base == "otov2":
            raise ValueError("otov2 prunes in one long round, but target.drop looks at accuracy between rounds")
        return self

    @model_validator(mode="after")
    def _aims_at_what_the_base_cuts(self) -> "Prune":
        if (self.base == "on-the-fly") != (self.target.sparsity is not None):
            raise ValueError("base on-the-fly cuts weights to a target.sparsity, the others units to macs or such")
        return self

    @property
    def last(self) -> float:
        """Return `end`, or what null stands for if the rounds ask for no more."""
        if self.end is not None:
            return self.end
        if self.base != "depgraph" or self.target.drop is not None:
            return self.latest
        return self.start + SHORT_SPAN * (1 - self.start)

    @property
    def latest(self) -> float:
        """Return the largest `end` that null stands for."""
        return self.start + LONG_SPAN * (1 - self.start)

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> "Prune":
        if self.start >= self.last:
            raise ValueError(f"start ({self.start}) must lie before end ({self.last})")
        return self


Criterion = Literal["auto", "reselect", "significance", "cosine", "norm_per_update", "norm_per_decay", "norm_relative"]


class Rectify(Section):
    """Sets when a decaying unit is released. The paper names the criteria; the formulas are ours."""

    criterion: Criterion = Field(
        default="auto",
        description="reselect: in the middle of a decay all units are chosen anew, by size and gradient together; "
        "others measure how training wants a unit longer; auto: reselect, significance for a base that chooses step by "
        "step, and where settings below `start` are given",
    )
    start: Fraction | None = Field(
        default=None,
        description="fraction of the decay before which no unit is judged, or after which all are chosen anew; null: "
        "0.3, or 0.4",
    )
    rate: float = Field(
        default=2.0,
        description="T_rate: significance counts standard errors of the mean outward direction; others: 0.2",
    )
    length: float = Field(default=1.0, description="T_len: gradient length / its mean over the group")
    combine: Literal["and", "or"] = Field(default="and", description="whether rate and length must both be exceeded")
    smoothing: float = Field(
        default=0.9, ge=0, lt=1, description="of both criteria over the steps; 0 judges each step alone"
    )
    hits: Positive = Field(default=1, description="consecutive steps for which the criteria must hold")
    limit: NonNegative = Field(default=1, description="releases per unit at most")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_its_criterion(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        judges = values.keys() & {"rate", "length", "combine", "smoothing", "hits", "limit"}
        values = ({"criterion": "significance"} if judges else {}) | values
        is_significance = values.get("criterion", "auto") in ("auto", "reselect", "significance")
        return values if is_significance else {"rate": 0.2} | values

    def resolve(self, *, in_rounds: bool) -> "Rectify":
        """Return what `auto` and null stand for. in_rounds: whether the base chooses a round's units at its start."""
        criterion = self.criterion if self.criterion != "auto" else "reselect" if in_rounds else "significance"
        start = self.start if self.start is not None else 0.4 if criterion == "reselect" else 0.3
        return self.model_copy(update={"criterion": criterion, "start": start})


class Decay(Section):
    """Configures Smooth Pruning. With `steps: 1` and `rectify: false` only the base pruner acts."""

    steps: Count = Field(
        default="auto",
        description="steps until a chosen unit is zero; 1 cuts at once; auto: as many as fit, 200 or so",
    )
    envelope: Literal["exact", "shrink-only", "multiplicative"] = Field(
        default="exact", description="how the norm of a unit is held to its decay; multiplicative is HESSO's"
    )
    rectify: Rectify | None = Field(
        default=None, description="when training wins a decaying unit back; false: never, true: by the defaults below"
    )

    @field_validator("rectify", mode="before", json_schema_input_type=Rectify | bool | None)
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        return None if value is False else {} if value is True else value

    def may_fall_short(self, *, in_rounds: bool) -> bool:
        """Tell whether units can be released for which no others go, so that a round leaves more than it may.

        in_rounds: as in `Rectify.resolve`.
        """
        return self.rectify is not None and self.rectify.resolve(in_rounds=in_rounds).criterion != "reselect"


class Compact(Section):
    """Sets what happens to the mean outputs of units that are cut at once instead of decaying."""

    fold_mean: bool | None = Field(
        default=None, description="fold them into the layers that read them; null: when no training follows"
    )
    fold_batches: Positive = Field(
        default=20, description="training batches to measure the means on; no labels are needed"
    )


class Training(Section):
    """Configures one stage of training."""

    epochs: NonNegative = Field(default=20, description="passes over the training images; 0 leaves the stage out")
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="sgd", description="what takes the steps")
    lr: LearningRate = Field(default=0.05, description="learning rate at its highest")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of the optimizer sgd")
    nesterov: bool = Field(default=False, description="Nesterov's momentum, for sgd")
    schedule: Literal["cosine", "step", "multistep", "triangular", "constant"] = Field(
        default="cosine", description="how the learning rate changes over the stage"
    )
    milestones: tuple[Fraction, ...] = Field(
        default=(0.6, 0.8), description="multistep: fractions of the stage at which the rate falls"
    )
    step_size: Positive = Field(default=30, description="step: epochs between two falls of the rate")
    gamma: float = Field(default=0.1, gt=0, le=1, description="step, multistep: what the rate is multiplied by")
    warmup_epochs: float = Field(default=0, ge=0, description="epochs in which the rate rises from zero")
    weight_decay: float = Field(default=5e-4, ge=0, description="L2 penalty of the optimizer")
    label_smoothing: float = Field(default=0, ge=0, lt=1, description="share of the label spread over all classes")
    mixup: float = Field(default=0, ge=0, description="alpha of the Beta distribution that blends images; 0: no mixup")
    clip_grad: float | None = Field(default=None, gt=0, description="largest L2 norm of all gradients; null: no limit")
    distill: Fraction = Field(default=0.0, description="weight of the dense model's softened outputs in the loss")
    temperature: float = Field(default=4.0, gt=0, description="of distillation")

    @model_validator(mode="after")
    def _has_room(self) -> "Training":
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be fewer than epochs ({self.epochs})")
        return self


class Retraining(Training):
    """Configures one stage of training a model that is pruned, with the dense model as its teacher."""

    distill: Fraction = Field(
        default=0.7,
        description="weight of the dense model's softened outputs in the loss, unless that only guesses; 1: labels are "
        "not used",
    )


class Engine(Section):
    """Sets how a GPU is used. Nothing here changes a run on a CPU."""

    compile: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: the model runs as a CUDA graph where that was measured to be faster; off: kernel by kernel",
    )
    deterministic: bool = Field(
        default=False, description="the same bits on the same GPU and versions, where its operators can; slower"
    )


class Checkpoint(Section):
    """Sets how much work an interruption may lose."""

    every: Positive = Field(default=500, description="steps between checkpoints")

"""Define the whole recipe, and check that its sections agree."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, model_validator

from dpm_cli.recipe.code import is_own_code
from dpm_cli.recipe.deployment import Quantize
from dpm_cli.recipe.sections import (
    Checkpoint,
    Compact,
    Data,
    Decay,
    Engine,
    Model,
    Prune,
    Retraining,
    Training,
)
from dpm_cli.recipe.values import ExportFormat, NonNegative, Section


class Recipe(Section):
    """Holds everything a run depends on besides the model file."""

    model: Model = Field(description="the architecture, and the images it takes")
    data: Data = Field(description="the images")
    prune: Prune = Field(description="which units are removed, and when")
    decay: Decay = Field(default=Decay(), description="how chosen units shrink to zero, and when they are released")
    train: Retraining = Field(default=Retraining(), description="the training while units are chosen and decay")
    compact: Compact = Field(default=Compact(), description="what happens to the means of units that are cut at once")
    finetune: Retraining = Field(default=Retraining(lr=0.02), description="the training of the slim model")
    dense: Training | None = Field(default=None, description="the training of `dpm train`; null: as train")
    export: tuple[ExportFormat, ...] = Field(
        default=("torchscript", "onnx"),
        description="the files to write: torchscript, onnx, onnx-fp16, onnx-int8, pt2, openvino, executorch",
    )
    quantize: Quantize = Field(default=Quantize(), description="how the export onnx-int8 is made, and when it fails")
    track: tuple[Literal["tensorboard", "mlflow"], ...] = Field(
        default=(), description="stores of other tools to log to as well, inside the output folder: tensorboard, mlflow"
    )
    opset: int = Field(default=18, ge=18, le=30, description="of the ONNX files")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of everything random")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="numbers to train with; auto: bf16 where the device is fast at it"
    )
    engine: Engine = Field(default=Engine(), description="how a GPU is used")
    counter: Literal["flop_counter", "thop"] = Field(
        default="flop_counter", description="what counts MACs for the report; thop for comparing with papers"
    )
    recalibrate_batches: NonNegative = Field(
        default=20, description="batches to recompute BatchNorm statistics from at the end; 0: none"
    )
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="how much work an interruption may lose")
    _source: Path | None = PrivateAttr(None)
    _changes: tuple[str, ...] = PrivateAttr(())
    _typed: frozenset[str] = PrivateAttr(frozenset())  # settings that the user gave beside the file

    @model_validator(mode="after")
    def _can_see_its_floor(self) -> "Recipe":
        if self.prune.floor is not None and not self.data.validation:
            name = "max_drop" if self.prune.target.drop is None else "target.drop"
            raise ValueError(f"prune.{name} is judged on validation images: raise data.validation above 0")
        return self

    @model_validator(mode="after")
    def _can_judge_int8(self) -> "Recipe":
        if "onnx-int8" in self.export and not self.data.validation:
            raise ValueError("the export onnx-int8 is judged on validation images: raise data.validation above 0")
        return self

    @model_validator(mode="after")
    def _fills_its_input(self) -> "Recipe":
        side = max(self.model.input[1:])
        if self.data.resize is not None and self.data.crop == "none":
            raise ValueError("data.resize comes before a crop, but data.crop is none: leave one of them out")
        if self.data.resize is not None and self.data.resize < side:
            raise ValueError(f"data.resize is {self.data.resize}, less than the {side} pixels of model.input: raise it")
        return self

    @model_validator(mode="after")
    def _ends_with_the_cut(self) -> "Recipe":
        if self.cuts_weights and self.finetune.epochs:
            raise ValueError("base on-the-fly cuts weights after all training: set finetune.epochs: 0")
        if self.cuts_weights and (
            self.prune.max_drop is not None or self.prune.sparse_epochs or self.compact.fold_mean
        ):
            raise ValueError("base on-the-fly knows neither prune.max_drop, prune.sparse_epochs nor compact.fold_mean")
        return self

    @model_validator(mode="after")
    def _folds_what_is_cut(self) -> "Recipe":
        if self.compact.fold_mean and self.prune.base == "otov2":
            raise ValueError("compact.fold_mean folds what is cut at once, but otov2 shrinks units first: leave it out")
        if self.compact.fold_mean and self.train.epochs and self.decay.steps != 1:
            raise ValueError(
                "compact.fold_mean folds what is cut at once, but units that decay leave nothing behind: set "
                "decay.steps: 1 or train.epochs: 0"
            )
        return self

    @model_validator(mode="after")
    def _has_a_teacher(self) -> "Recipe":
        if self.dense and self.dense.distill:
            raise ValueError("dense.distill has no dense model to learn from: leave it out")
        return self

    @model_validator(mode="after")
    def _trains_with_labels(self) -> "Recipe":
        epochs = {"train": self.train.epochs + self.prune.sparse_epochs, "finetune": self.finetune.epochs}
        unlabelled = [name for name, count in epochs.items() if count and getattr(self, name).distill < 1]
        if not self.data.labels and unlabelled:
            wanted, instead = (
                " and ".join(f"{name}.{setting}" for name in unlabelled) for setting in ("distill: 1", "epochs: 0")
            )
            raise ValueError(
                "data.labels is false, but training needs labels or the dense model alone as its teacher: set "
                f"{wanted}, or {instead}"
            )
        if not self.data.labels and self.prune.floor is not None:
            name = "max_drop" if self.prune.target.drop is None else "target.drop"
            raise ValueError(f"data.labels is false, but prune.{name} is judged by labels: leave one of them out")
        return self

    def __eq__(self, other: object) -> bool:
        """Compare the settings, not where they came from."""
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    @property
    def source(self) -> Path | None:
        """Return the file that this recipe was read from, if any."""
        return self._source

    @property
    def changes(self) -> tuple[str, ...]:
        """Return what was changed beside the file, as `key=value`."""
        return self._changes

    @property
    def code(self) -> dict[str, str]:
        """Map the settings that name code of the user's own to that name."""
        named = {"model.arch": self.model.arch, "data.name": self.data.name.removeprefix("hf:")}
        return {setting: name for setting, name in named.items() if is_own_code(name)}

    @property
    def code_to_trust(self) -> dict[str, str]:
        """Leave out of `code` what the user has typed, as `--set model.arch=mynet:Net`: that is consent."""
        typed = self._typed
        return {
            setting: name
            for setting, name in self.code.items()
            if not any(setting == key or setting.startswith(f"{key}.") for key in typed)
        }

    @property
    def cuts_weights(self) -> bool:
        """Tell whether single weights are cut instead of units."""
        return self.prune.base == "on-the-fly"

    @property
    def folds_means(self) -> bool:
        """Tell whether the means of removed units are folded into the layers that read them."""
        if self.cuts_weights:
            return False
        if self.compact.fold_mean is not None:
            return self.compact.fold_mean
        return not self.train.epochs and not self.finetune.epochs

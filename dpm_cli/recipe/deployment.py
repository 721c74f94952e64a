"""Define the settings of what is handed over: quantization, and where latency is measured."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dpm_cli.recipe.values import Positive, Section


def parse_keep(value: object) -> object:
    if value == "auto" or isinstance(value, list | tuple):
        return value
    raise ValueError("must be a list of layer names or patterns such as [fc], or auto")


KeptInFloat = Annotated[
    tuple[str, ...] | Literal["auto"],
    BeforeValidator(parse_keep, json_schema_input_type=tuple[str, ...] | Literal["auto"]),
]


class Quantize(Section):
    """Configures the export `onnx-int8`: static 8-bit quantization, calibrated on training images."""

    images: Annotated[Positive, Field(le=10**5)] = Field(default=256, description="training images to calibrate on")
    calibrate: Literal["minmax", "percentile", "entropy"] = Field(
        default="minmax", description="how the range of each activation follows from these images"
    )
    percentile: float = Field(
        default=99.99, gt=50, le=100, description="percentile: share of each activation's values inside its range"
    )
    max_drop: float | None = Field(
        default=1.0,
        ge=0,
        le=100,
        description="points of validation accuracy that int8 may cost (without labels: of equal answers); more fails "
        "the export; null: no limit",
    )
    keep: KeptInFloat = Field(
        default="auto",
        description="layers that stay in fp32: names or patterns; auto: the most sensitive ones, if max_drop needs it",
    )
    reduce_range: bool = Field(
        default=False, description="7-bit weights, for x86 CPUs without VNNI, whose 8-bit sums can overflow"
    )


class Latency(Section):
    """Says what `target.latency` is measured in: single images in ONNX Runtime on one thread, unless set."""

    runtime: Literal["onnxruntime", "openvino", "torch"] = Field(
        default="onnxruntime", description="where exports are run; torch: the model itself, on the device of the run"
    )
    batch: Annotated[Positive, Field(le=10**4)] = Field(default=1, description="images per call")
    threads: Annotated[Positive, Field(le=1024)] = Field(default=1, description="threads of the runtime, on a CPU")

"""Define the values that settings take: ranges of numbers, amounts such as "60M", and the base of all sections."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

DATASETS = ("digits", "cifar10", "cifar100", "fashion-mnist", "folder", "csv")
MOST_ROUNDS = 10_000
MOST_AMOUNT = 1e18  # of operations, bytes or parts of a second
SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


class Section(BaseModel):
    """All sections derive from this. Unknown keys are errors, and settings never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _read_percent(value: object) -> object:
    """Turn "50%" into 0.5; other values stay as they are."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    return min(float(match[1]) / 100, 1.0) if match else value  # above 1 it would be taken for an absolute number


def parse_amount(value: object) -> float:
    """Read a kept fraction in (0, 1), also as "47%", or an absolute number such as 60000000, "60M" or "1.2G"."""
    value = _read_percent(value)
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGBkmgb]?)\s*", value)):
        value = float(match[1]) * SUFFIXES.get(match[2].upper(), 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST_AMOUNT:
        raise ValueError("must be a fraction to keep such as 0.47, or an absolute such as 60M")
    if 1 <= value < 2:
        raise ValueError(f"{value} keeps everything: a fraction to keep lies below 1, an absolute is 2 or more")
    return float(value)


def parse_size(value: object) -> float:
    """Read a kept fraction in (0, 1), also as "47%", or bytes such as "5MB", "800 KB" or 5000000."""
    value = _read_percent(value)
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?)B\s*", value, re.IGNORECASE)
        if not match:
            raise ValueError("must be a fraction to keep such as 0.47, or a size in B, KB, MB or GB such as 5MB")
        value = float(match[1]) * SUFFIXES.get(match[2].upper(), 1)
    return parse_amount(value)


def parse_latency(value: object) -> float:
    """Read a kept fraction in (0, 1), also as "60%", or a time such as "12ms" or "800us"; return nanoseconds."""
    value = _read_percent(value)
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(us|µs|ms|s)\s*", value)
        if match and 0 < float(match[1]) < MOST_AMOUNT:
            return float(match[1]) * {"s": 1e9, "ms": 1e6}.get(match[2], 1e3)
    elif type(value) is float and 0 < value < 1:
        return value
    raise ValueError("must be a fraction to keep such as 0.6, or a time in us, ms or s such as 12ms")


def show_latency(value: float | None) -> float | str | None:
    """Write what `parse_latency` reads."""
    return value if value is None or value < 1 else f"{value / 1e6:.6f}ms"


def parse_step(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= 10**6):
        return value
    raise ValueError("must be a number of channels such as 8, or auto")


def parse_count(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= 10**12):
        return value
    raise ValueError("must be a whole number of 1 or more, or auto")


def parse_rounds(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= MOST_ROUNDS):
        return value
    raise ValueError(f"must be a whole number from 1 to {MOST_ROUNDS}, or auto")


def parse_sparsities(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def parse_data_name(value: object) -> object:
    """Accept a known dataset, hf:NAME of the Hugging Face hub, or package.module:function of the user's own."""
    if isinstance(value, str) and (value in DATASETS or re.fullmatch(r"hf:[\w./-]+|(\w+\.)*\w+:\w+", value)):
        return value
    raise ValueError(f"known: {', '.join(DATASETS)}, hf:NAME, package.module:function")


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, le=10**12)]
NonNegative = Annotated[int, Field(ge=0, le=10**12)]
Side = Annotated[int, Field(ge=1, le=8192)]
LearningRate = Annotated[float, Field(gt=0, le=10)]  # beyond, nets end at chance
ExportFormat = Literal["torchscript", "onnx", "onnx-fp16", "onnx-int8", "pt2", "openvino", "executorch"]
Amount = Annotated[float, BeforeValidator(parse_amount, json_schema_input_type=float | str)]
CostKind = Literal["macs", "params", "channels", "size"]
COST_KINDS: tuple[CostKind, ...] = ("macs", "params", "channels", "size")
Size = Annotated[float, BeforeValidator(parse_size, json_schema_input_type=float | str)]
Time = Annotated[
    float, BeforeValidator(parse_latency, json_schema_input_type=float | str), PlainSerializer(show_latency)
]
Step = Annotated[int | Literal["auto"], BeforeValidator(parse_step, json_schema_input_type=int | Literal["auto"])]
Count = Annotated[int | Literal["auto"], BeforeValidator(parse_count, json_schema_input_type=int | Literal["auto"])]
RoundCount = Annotated[
    int | Literal["auto"], BeforeValidator(parse_rounds, json_schema_input_type=int | Literal["auto"])
]
DataName = Annotated[
    str,
    BeforeValidator(parse_data_name),
    WithJsonSchema({"anyOf": [{"enum": list(DATASETS)}, {"type": "string", "pattern": ":"}]}),
]
Sparsity = Annotated[float, Field(gt=0, lt=1)]
Sparsities = Annotated[
    tuple[Sparsity, ...],
    BeforeValidator(parse_sparsities, json_schema_input_type=Sparsity | tuple[Sparsity, ...]),
    Field(min_length=1, max_length=20),
]

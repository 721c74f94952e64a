"""The number format of a training step: weights stay fp32, convolutions and products may run in 16 bits."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import nn

from dpm_cli.errors import UsageError

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """How forward passes run. `scaler` keeps small fp16 gradients from vanishing; none for fp32 and bf16."""

    name: Literal["fp32", "bf16", "fp16"]
    device_type: str
    scaler: torch.amp.GradScaler | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """A context for forward passes; nothing changes in fp32."""
        return torch.autocast(self.device_type, FORMATS[self.name], enabled=self.name != "fp32")


def choose_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """ "auto": bf16 where the device computes it in hardware, else fp32. Raises UsageError for fp16 off CUDA."""
    match name:
        case "auto":
            return Precision("bf16" if has_fast_bf16(device) else "fp32", device.type)
        case "fp32" | "bf16":
            return Precision(name, device.type)
        case "fp16":
            if device.type != "cuda":
                raise UsageError(
                    f"precision is 'fp16', which needs CUDA; the device is {device}: use bf16, fp32 or auto"
                )
            return Precision("fp16", "cuda", torch.amp.GradScaler("cuda"))
        case _:
            assert_never(name)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware: x86 with AVX512-BF16 or AMX, CUDA from capability 8.0."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def to_fast_layout_(model: nn.Module) -> None:
    """Lay 4-D weights out channels last; activations follow. Call on the device, before training, after compacting."""
    model.to(memory_format=torch.channels_last)

"""Choose mixed precision and memory format. Weights stay fp32; convolutions and products may run in 16 bits."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from dpm_cli.engine.cpu_operations import FasterOnCpu
from dpm_cli.errors import UsageError
from dpm_cli.layers.modes import in_mode

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Sets the precision of forward passes. `scaler` keeps small fp16 gradients from vanishing; else it is None."""

    name: Literal["fp32", "bf16", "fp16"]
    device_type: str
    scaler: torch.amp.GradScaler | None = None

    @contextmanager
    def autocast(self, *, cached: bool = True) -> Iterator[None]:
        """Return a context for forward passes. In fp32 it changes nothing, bit for bit.

        cached: weights in 16 bits are kept until the outermost context ends.
        """
        with ExitStack() as stack:
            is_mixed, format = self.name != "fp32", FORMATS[self.name]
            stack.enter_context(torch.autocast(self.device_type, format, enabled=is_mixed, cache_enabled=cached))
            if self.name == "bf16" and self.device_type == "cpu":
                stack.enter_context(FasterOnCpu())
            yield


def choose_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """Find a precision by name. "auto": bf16 if in hardware, else fp32. Raises UsageError for fp16 off CUDA."""
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
    """Tell if the device multiplies bf16 in hardware: x86 with AVX512-BF16 or AMX, CUDA from capability 8.0."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_layout(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Choose the memory format of images and 4-D weights: channels last, in which convolutions are fastest.

    Falls back to contiguous if the model's code fails with that, as `x.view(len(x), -1)` of a feature map does.
    images: (B, C, H, W), as the model takes them, on its device.
    """
    trial = copy.deepcopy(model)
    lay_out_(trial, torch.channels_last)
    try:
        with in_mode(trial, training=False), torch.no_grad():
            trial(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def lay_out_(model: nn.Module, layout: torch.memory_format) -> None:
    """Set the memory format of all 4-D parameters and buffers. `Module.to` fails on 5-D ones, those of a Conv3d."""
    for tensor in (*model.parameters(), *model.buffers()):
        for each in (tensor, tensor.grad):
            if each is not None and each.dim() == 4:
                each.data = each.data.to(memory_format=layout)

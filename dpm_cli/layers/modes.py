"""Temporarily switch a module to train or eval mode, or attention to plain operators."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Temporarily switch a module to train or eval mode; every submodule returns to its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def plain_attention() -> Iterator[None]:
    """Run attention as plain operators: the fused fast path hides it from graphs, counters and exporters."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def four_axes_attention() -> Iterator[None]:
    """Run attention over three, five or more axes as one over four, the only one that the ONNX exporter knows."""
    attend = functional.scaled_dot_product_attention

    def fold(tensor: Tensor, lead: torch.Size) -> Tensor:
        return tensor.expand(*lead, *tensor.shape[-3:]).flatten(0, -4)

    def attend_over_four(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if query.ndim == 4:
            return attend(query, key, value, attn_mask, *args, **kwargs)
        if query.ndim == 3:  # (B, L, D): one head
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
            return attend(query, key, value, mask, *args, **kwargs).squeeze(1)
        lead = query.shape[:-3]
        query, key, value = (fold(tensor, lead) for tensor in (query, key, value))
        mask = fold(attn_mask, lead) if attn_mask is not None and attn_mask.ndim > 3 else attn_mask
        folded = attend(query, key, value, mask, *args, **kwargs)
        return folded.reshape(*lead, *folded.shape[1:])

    functional.scaled_dot_product_attention = attend_over_four
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attend

"""Run attention layers that have lost heads.

PyTorch's own attention takes the width of its heads from the width of its input, so it cannot run with fewer heads
than it was built with. It gets a subclass with the same parameters whose forward takes its sizes from the weights; a
layer becomes one in place when it is compacted, or rebuilt from a slim file.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpm_cli.layers.counting import fit_counting_layer_


def fit_slim_class_(module: nn.Module) -> bool:
    """Give a compacted layer the class that runs with its remaining weights, if it has one.

    Returns whether it takes its sizes from its weights then, so that nothing else needs to change.
    """
    if fit_counting_layer_(module):
        return True
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        rows, width = module.in_proj_weight.shape
        if rows != 3 * module.embed_dim or width != module.embed_dim:
            module.num_heads = rows // 3 // module.head_dim
            module._qkv_same_embed_dim = False  # or nn.TransformerEncoderLayer reads the weights without calling this
            module.__class__ = SlimMultiheadAttention
        return True
    if type(module).__name__ in ("ShiftedWindowAttention", "SlimWindowAttention"):
        from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

        if isinstance(module, ShiftedWindowAttention) and not isinstance(module, ShiftedWindowAttentionV2):
            rows, width = module.qkv.weight.shape
            module.num_heads = module.relative_position_bias_table.shape[1]
            module.__class__ = _window_attention_class() if rows != 3 * width else ShiftedWindowAttention
            return True
    return False


class SlimMultiheadAttention(nn.MultiheadAttention):
    """Self- or cross-attention with `num_heads` · `head_dim` inner features, fewer than `embed_dim`."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend like `nn.MultiheadAttention` to batched inputs (B, N, E), or (N, B, E) without `batch_first`."""
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        q, k, v = (
            self._split(F.linear(x, weight, bias))  # (B, H, N, D)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        attention: Tensor | None = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) / self.head_dim**0.5
            attention = (logits if mask is None else logits + mask).softmax(-1)  # (B, H, N, M)
            out = F.dropout(attention, self.dropout, self.training) @ v
            if average_attn_weights:
                attention = attention.mean(1)
        else:
            dropout = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.head_dim**-0.5)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, N, E)
        return (out if self.batch_first else out.transpose(0, 1)), attention

    def _split(self, x: Tensor) -> Tensor:
        """Split heads: (B, N, H·D) -> (B, H, N, D)."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Join both masks into one to add to the logits, broadcastable to (B, H, N, M)."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, like)
            if mask.dim() == 3:  # (B·H, N, M) of the dense layer cannot be assigned to heads any more
                raise ValueError("a mask per head does not fit an attention layer that has lost heads")
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, like)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


_window_class: type[nn.Module] | None = None


def _window_attention_class() -> Any:
    """Return `SlimWindowAttention`, made on first use because torchvision is slow to import."""
    global _window_class
    if _window_class is not None:
        return _window_class
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    class SlimWindowAttention(ShiftedWindowAttention):  # type: ignore[misc]
        """Swin's attention within shifted windows, with any number of inner features (arXiv 2103.14030, §3.2)."""

        def forward(self, x: Tensor) -> Tensor:
            """x: (B, H, W, C)"""
            window, (height, width) = self.window_size, x.shape[1:3]
            pad = [-height % window[0], -width % window[1]]
            x = F.pad(x, (0, 0, 0, pad[1], 0, pad[0]))
            rows, columns = height + pad[0], width + pad[1]
            # A window as large as the map needs no shift.
            shift = [0 if w >= size else s for w, size, s in zip(window, (rows, columns), self.shift_size, strict=True)]
            if any(shift):
                x = x.roll((-shift[0], -shift[1]), (1, 2))
            grid = (rows // window[0], columns // window[1])
            x = x.reshape(x.shape[0], grid[0], window[0], grid[1], window[1], -1)  # (B, R, w, S, w, C)
            tokens = x.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (B·R·S, w·w, C)

            inner = self.proj.in_features
            q, k, v = (
                part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B·R·S, heads, w·w, D)
                for part in self.qkv(tokens).split(inner, -1)
            )
            logits = (q * (inner // self.num_heads) ** -0.5) @ k.transpose(-2, -1)
            logits = logits + self.get_relative_position_bias()
            if any(shift):
                mask = _shift_mask(rows, columns, window, shift, logits)  # (R·S, w·w, w·w)
                logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
            attention = F.dropout(logits.softmax(-1), self.attention_dropout, self.training)
            out = self.proj((attention @ v).transpose(1, 2).flatten(2))
            out = F.dropout(out, self.dropout, self.training)

            out = out.reshape(-1, *grid, *window, out.shape[-1])  # (B, R, S, w, w, C)
            out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, rows, columns, C)
            if any(shift):
                out = out.roll((shift[0], shift[1]), (1, 2))
            cropped: Tensor = out[:, :height, :width].contiguous()
            return cropped

    _window_class = SlimWindowAttention
    return SlimWindowAttention


def _shift_mask(rows: int, columns: int, window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """Mask tokens that a cyclic shift brought together from far apart: (windows, w·w, w·w)."""

    def regions(size: int, window: int, shift: int) -> Tensor:
        index = torch.arange(size, device=like.device)
        return (index >= size - window).long() + (index >= size - shift).long() if shift else torch.zeros_like(index)

    region = regions(rows, window[0], shift[0])[:, None] * 3 + regions(columns, window[1], shift[1])[None]
    region = region.reshape(rows // window[0], window[0], columns // window[1], window[1])  # (R, w, S, w)
    region = region.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (R·S, w·w)
    differ = region[:, :, None] != region[:, None, :]
    return torch.zeros(differ.shape, dtype=like.dtype, device=like.device).masked_fill_(differ, -100.0)

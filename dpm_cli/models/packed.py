"""Store a weight of which few entries matter in few bytes: a bit per entry, the kept values, and fillings.

The other entries hold one number per filter (zero, or a mean), or one of two, chosen by one more bit each.
"""

import io
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Packed = dict[str, Tensor]  # shape, mask, values, fillings, and choices where there are two fillings


def pack(weight: Tensor, mask: Tensor) -> Packed:
    """Pack a weight. mask: True for the kept entries.

    Raises ValueError if a filter's other entries hold more than two numbers.
    """
    weight = weight.detach().cpu().contiguous()
    rows, cut = weight.flatten(1), ~mask.cpu().contiguous().flatten(1)  # (filters, entries)
    infinity = torch.tensor(float("inf"), dtype=rows.dtype)
    low = torch.where(cut, rows, infinity).amin(1, keepdim=True)
    high = torch.where(cut, rows, -infinity).amax(1, keepdim=True)
    if not ((rows == low) | (rows == high) | ~cut).all():
        raise ValueError("the entries that were cut hold more than two numbers in a filter")
    none_cut = ~cut.any(1, keepdim=True)
    low, high = (filling.masked_fill(none_cut, 0) for filling in (low, high))
    packed = {
        "shape": torch.tensor(weight.shape),
        "mask": _to_bits(~cut),
        "values": rows[~cut],
        "fillings": low if torch.equal(low, high) else torch.cat([low, high], 1),  # (filters, 1 or 2)
    }
    if packed["fillings"].shape[1] == 2:
        packed["choices"] = _to_bits((rows == high)[cut])
    return packed


def unpack(packed: Mapping[str, Any]) -> Tensor:
    """Return the weight that `pack` was given, bit for bit.

    Raises ValueError or RuntimeError for what `pack` cannot have written.
    """
    expected = {"shape", "mask", "values", "fillings"} | (packed.keys() & {"choices"})
    if packed.keys() != expected or not all(isinstance(value, Tensor) for value in packed.values()):
        raise ValueError("a packed weight has other parts")
    shape: list[int] = packed["shape"].tolist()
    count = prod(shape)
    if len(shape) < 2 or min(shape) < 1 or 8 * packed["mask"].numel() < count:  # memory stays below the file's size
        raise ValueError(f"a packed weight of shape {shape}")
    keeps = _from_bits(packed["mask"], count).view(shape[0], -1)
    fillings = packed["fillings"].view(shape[0], -1)
    chosen = torch.zeros(keeps.shape, dtype=torch.int64)
    if "choices" in packed:
        chosen[~keeps] = _from_bits(packed["choices"], int((~keeps).sum())).long()
    rows: Tensor = fillings.gather(1, chosen).to(packed["values"].dtype)
    rows[keeps] = packed["values"]
    return rows.view(shape)


def count_packed_bytes(module: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Measure the saved state dict with these parameters packed."""
    state: dict[str, Any] = dict(module.state_dict())
    state |= {name: pack(state[name], mask) for name, mask in masks.items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


def _to_bits(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.numpy().ravel()))


def _from_bits(bits: Tensor, count: int) -> Tensor:
    flags = np.unpackbits(bits.numpy(), count=count)
    if len(flags) != count or bits.numel() != -(-count // 8):
        raise ValueError("a packed weight has too few or too many bits")
    return torch.from_numpy(flags.astype(bool))

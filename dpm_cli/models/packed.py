"""Store a weight of which few entries matter in few bytes: a bit per entry, the kept values, and fillings.

The other entries hold one number per filter (zero, or a mean), or one of two, chosen by one more bit each.
"""

import io
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

BLOCK = 1 << 20  # entries unpacked at once; a multiple of 8
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


def shape_of(packed: Mapping[str, Any]) -> list[int]:
    """Return the shape of a packed weight, after comparing the sizes of all parts. Nothing is unpacked.

    Raises ValueError or RuntimeError for what `pack` cannot have written.
    """
    expected = {"shape", "mask", "values", "fillings"} | (packed.keys() & {"choices"})
    if packed.keys() != expected or not all(isinstance(value, Tensor) for value in packed.values()):
        raise ValueError("a packed weight has other parts")
    if packed["shape"].dim() != 1 or packed["shape"].is_floating_point() or not 2 <= packed["shape"].numel() <= 8:
        raise ValueError("a packed weight has no shape")
    shape: list[int] = packed["shape"].tolist()
    if min(shape) < 1:
        raise ValueError(f"a packed weight of shape {shape}")
    count, kept = prod(shape), packed["values"].numel()
    bits = {"mask": count} | ({"choices": count - kept} if "choices" in packed else {})
    if not all(packed[name].dtype == torch.uint8 and packed[name].numel() == -(-n // 8) for name, n in bits.items()):
        raise ValueError("a packed weight has too few or too many bits")
    fillings = packed["fillings"]
    if fillings.numel() != shape[0] * (2 if "choices" in packed else 1) or fillings.dtype != packed["values"].dtype:
        raise ValueError("a packed weight has too few or too many fillings")
    return shape


def unpack(packed: Mapping[str, Any]) -> Tensor:
    """Return the weight that `pack` was given, bit for bit, in little more memory than it takes.

    Raises ValueError or RuntimeError for what `pack` cannot have written.
    """
    shape = shape_of(packed)
    count, columns = prod(shape), prod(shape[1:])
    fillings = packed["fillings"].view(shape[0], -1)  # (filters, 1 or 2)
    values, mask = packed["values"].view(-1), packed["mask"].numpy()
    flat: Tensor = fillings[:, :1].repeat(1, columns).view(count)
    taken = chosen = 0  # kept values and choices so far
    for start in range(0, count, BLOCK):
        part = flat[start : start + BLOCK]
        keeps = torch.from_numpy(_bits(mask, start, len(part)))
        if "choices" in packed:
            cut = (~keeps).nonzero()[:, 0]
            second = torch.from_numpy(_bits(packed["choices"].numpy(), chosen, len(cut)))
            places = cut[second]
            part[places] = fillings[(places + start) // columns, 1]
            chosen += len(cut)
        kept = int(keeps.sum())
        part[keeps] = values[taken : taken + kept]
        taken += kept
    if taken != len(values):
        raise ValueError("a packed weight has too few or too many values")
    return flat.view(shape)


def count_packed_bytes(module: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Measure the saved state dict with these parameters packed."""
    state: dict[str, Any] = dict(module.state_dict())
    state |= {name: pack(state[name], mask) for name, mask in masks.items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


def _to_bits(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.numpy().ravel()))


def _bits(packed: NDArray[np.uint8], start: int, count: int) -> NDArray[np.bool_]:
    """Unpack `count` bits from bit `start` on."""
    first = start // 8
    flags = np.unpackbits(packed[first : -(-(start + count) // 8)])[start - 8 * first :][:count]
    return flags.astype(bool)

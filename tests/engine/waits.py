"""Count where Python waits for tensors, on a CPU that never has to."""

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PACKAGE = "dpm_cli"
# On a GPU each of these waits until all kernels before it are done, whatever calls it: `if tensor:`, float(tensor) …
READS = {
    getattr(Tensor, name)
    for name in (
        *("item", "tolist", "cpu", "numpy", "nonzero", "equal", "unique", "masked_select"),
        *("__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "__iter__", "__reduce_ex__"),
    )
} | {torch.nonzero, torch.equal, torch.allclose, torch.unique, torch.masked_select, torch.bincount}
# These copy Python's numbers to the device, which waits as well: only pinned memory is copied without.
COPIES = {torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor}


class Waits(TorchFunctionMode):
    """While active, notes every call that would wait for a GPU, by the line of ours that made it."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in READS or function in COPIES or _picks_by_mask(function, args):
            frame = sys._getframe(1)
            while frame and PACKAGE not in frame.f_code.co_filename.split("/"):
                frame = frame.f_back
            if frame:
                path, line = frame.f_code.co_filename, frame.f_lineno
                self.places.append(f"{Path(path).name}:{line} {function.__name__}: {linecache.getline(path, line)}")
        return function(*args, **(kwargs or {}))

    def take(self) -> list[str]:
        """Return what was noted since the last call."""
        places, self.places = self.places, []
        return places


def _picks_by_mask(function: Callable[..., Any], args: Any) -> bool:
    """Tell whether a mask selects elements: their number is known only on the device."""
    if function not in (Tensor.__getitem__, Tensor.__setitem__) or len(args) < 2:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool and part.dim() for part in index)

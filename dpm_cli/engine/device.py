"""Choose the device of tensors."""

import torch

from dpm_cli.errors import UsageError


def choose_device(name: str) -> torch.device:
    """Find a device by name: "auto" (CUDA if present, else CPU), "cpu", "cuda" (the current one) or "cuda:1".

    A CUDA device always carries its index, so that it equals the `.device` of tensors on it.
    Raises UsageError that names the available devices.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = ["cpu", *(f"cuda:{index}" for index in range(count))]
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cuda" and count:
        name = f"cuda:{torch.cuda.current_device()}"
    if name not in present:
        raise UsageError(f"device is {name!r}; here: auto, {', '.join(present)}")
    return torch.device(name)

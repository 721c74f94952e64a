"""Set CUDA's libraries up for training, and leave them as they were."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpm_cli.recipe.sections import Engine


@contextmanager
def tuned_backends(device: torch.device, engine: Engine) -> Iterator[None]:
    """Let cuDNN try its algorithms once per shape, or use only deterministic ones. On a CPU this changes nothing.

    Call before the first product on the device: cuBLAS reads its workspace from the environment when it starts.
    Operators that have no deterministic implementation warn, and are then the only ones whose bits may differ.
    """
    if device.type != "cuda":
        yield
        return
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.backends.cudnn.benchmark = not engine.deterministic
    if engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic, warn_only=warns_only)

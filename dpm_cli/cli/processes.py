"""Several processes that a launcher such as torchrun started: one of them speaks to the user."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def speaking(device: str) -> Iterator[bool]:
    """Whether this process is the one. Errors within are told by the process that met the first one."""
    if "WORLD_SIZE" not in os.environ:
        yield True  # without waiting for torch to be imported
        return
    if not os.environ.get("DPM_DEBUG"):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every process warns of what is meant to be
    from dpm_cli.engine.distributed import join

    with join(device) as world:
        yield world.is_main

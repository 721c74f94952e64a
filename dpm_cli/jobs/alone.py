"""Let one run at a time use what a process has only once, and leave the caller's settings as they were."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_running = threading.RLock()


@contextlib.contextmanager
def alone_in_process() -> Iterator[None]:
    """Wait for runs in other threads, record gradients whatever the caller does, and restore the random generators.

    torch keeps the generator and switches of its backends per process, and exporters change these for a while.
    """
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else ()
    with _running, torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        yield

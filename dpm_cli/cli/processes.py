"""Let one of the processes that a launcher such as torchrun started speak to the user."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def speaking(device: str) -> Iterator[bool]:
    """Yield whether this process speaks to the user. The process that meets the first error reports it."""
    if "WORLD_SIZE" not in os.environ:
        yield True  # without importing torch, which takes a second
        return
    if not os.environ.get("DPM_DEBUG"):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise every process prints harmless warnings
    from dpm_cli.engine.distributed import join

    with join(device) as world:
        try:
            yield world.is_main
        except BaseException:
            _outlive_launcher()
            raise


def _outlive_launcher() -> None:
    """Ignore SIGTERM from now on: this process ends in seconds, after it has said why.

    Launchers send it to all as soon as one has died, and end by SIGKILL what stays longer than their patience.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

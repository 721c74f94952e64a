"""Turn out-of-memory and dead workers into one-line errors."""

import contextlib
from collections.abc import Iterator

import torch

from dpm_cli.errors import RunError


@contextlib.contextmanager
def explaining_faults(batch: int, more: str = "") -> Iterator[None]:
    """Turn "out of memory" on GPU or CPU, and the death of a decoding process, into a RunError.

    The message names the batch that was tried and a smaller one. more: further advice for a smaller batch.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        # raised by a signal handler, at any point of the run: torch.save may turn it into an error of its own
        if any("DataLoader worker" in str(each) for each in (error, error.__context__)):
            raise RunError(
                "a process that decodes images was killed, maybe for its memory; lower data.workers"
            ) from None
        if not _is_out_of_memory(error):
            raise
        smaller = f"try --set data.batch={batch // 2}{more}" if batch > 1 else "use smaller images or a smaller model"
        raise RunError(f"out of memory with data.batch {batch}: {smaller}") from None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error)  # CPU; CUDA's libraries

"""The C library's allocator during training: memory that one step frees, the next step wants again."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3), from glibc's malloc.h
NEVER = -1  # of a threshold: beyond every size
LARGEST = 32 << 20  # bytes: the most that every glibc accepts for MMAP_THRESHOLD


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """The process keeps what it frees, for a while, instead of handing it back and faulting it in again page by page.

    By default glibc gives the end of its heap back to the system as soon as it is free, so that every training step on
    a CPU gets its activations as new pages, to be zeroed by the kernel. Blocks beyond 32 MiB still go back at once, or
    the holes they leave would make the process grow. Afterwards all free memory is given back, and the thresholds are
    those that glibc raises them to by itself in a process that has freed such blocks. Elsewhere nothing happens.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt, malloc_trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is None or malloc_trim is None:  # musl has neither, other systems have their own ways
        yield
        return
    mallopt(MMAP_THRESHOLD, LARGEST)
    mallopt(TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        mallopt(TRIM_THRESHOLD, 2 * LARGEST)
        malloc_trim(0)

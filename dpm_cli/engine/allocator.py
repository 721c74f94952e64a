"""Tune the C library's allocator for training, where each step needs the memory that the last one freed."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3), from glibc's malloc.h
NEVER = -1  # a threshold above every size
LARGEST = 32 << 20  # bytes; the largest MMAP_THRESHOLD that every glibc accepts


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Keep freed memory in the process, instead of returning it and faulting it in again page by page.

    By default glibc returns the free end of its heap to the system at once, so every training step on a CPU gets new
    pages for its activations, which the kernel must zero. Blocks above 32 MiB are still returned at once, because the
    holes they leave would make the process grow. On exit all free memory is returned, and the thresholds are set to
    what glibc itself uses after a process has freed such blocks. Without glibc this does nothing.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt, malloc_trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is None or malloc_trim is None:  # musl and other systems lack them
        yield
        return
    mallopt(MMAP_THRESHOLD, LARGEST)
    mallopt(TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        mallopt(TRIM_THRESHOLD, 2 * LARGEST)
        malloc_trim(0)

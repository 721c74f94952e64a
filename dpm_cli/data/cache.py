"""Keep decoded images on disk, so that the second start of a run is instant."""

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np

from dpm_cli.data.decode import Pixels


def cache_folder() -> Path:
    """Return the folder for decoded images: $DPM_CACHE, else ~/.cache/dpm/decoded."""
    place = os.environ.get("DPM_CACHE")
    return Path(place) if place else Path("~/.cache/dpm/decoded").expanduser()


def find_cached(key: str, shape: tuple[int, ...]) -> Pixels | None:
    """Map the array of `shape` that is cached under `key`; return None if it is absent or damaged."""
    path = cache_folder() / f"{key}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        cached: Pixels = np.load(path, mmap_mode="c", allow_pickle=False)  # "c": torch wants it writable
        if cached.dtype == np.uint8 and cached.shape == shape:
            return cached
    return None


def cache(key: str, pixels: Pixels) -> None:
    """Keep decoded images for the next run. A full disk is no error: the cache only saves time."""
    with contextlib.suppress(OSError):
        _write(cache_folder() / f"{key}.npy", pixels)


def _write(path: Path, pixels: Pixels) -> None:
    """Write a temporary file and rename it, so that a reader sees the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, pixels, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise

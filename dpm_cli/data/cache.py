"""Decoded images kept on disk, so that the second start of a run is instant."""

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np

from dpm_cli.data.decode import Pixels


def cache_folder() -> Path:
    """Where decoded images are kept: $DPM_CACHE, else ~/.cache/dpm/decoded."""
    place = os.environ.get("DPM_CACHE")
    return Path(place) if place else Path("~/.cache/dpm/decoded").expanduser()


def find_cached(key: str, shape: tuple[int, ...]) -> Pixels | None:
    """The array of `shape` cached under `key`, mapped; none where there is none, or it is damaged."""
    path = cache_folder() / f"{key}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        cached: Pixels = np.load(path, mmap_mode="c", allow_pickle=False)  # "c": torch wants it writable
        if cached.dtype == np.uint8 and cached.shape == shape:
            return cached
    return None


def cache(key: str, pixels: Pixels) -> None:
    """Keep decoded images for the next time. It only saves time: where the disk is full, nothing is kept."""
    with contextlib.suppress(OSError):
        _write(cache_folder() / f"{key}.npy", pixels)


def _write(path: Path, pixels: Pixels) -> None:
    """Write beside, then rename: a reader sees the whole file or none."""
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

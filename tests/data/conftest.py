"""Image folders and settings that the data tests share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpm_cli.data import Splits, load_data
from dpm_cli.recipe.sections import Data


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def load() -> Callable[..., Splits]:
    """`load_data` with defaults for everything."""

    def load(name: str, **changes: Any) -> Splits:
        fixed = {"shape": (3, 8, 8), "classes": 3, "seed": 0, "device": "cpu"}
        known = {key: changes.pop(key, value) for key, value in fixed.items()}
        known |= {"tell": changes.pop("tell")} if "tell" in changes else {}
        data = {"name": name, "validation": 0.2, "workers": 0, "download": False} | changes
        return load_data(Data(**data), **known)

    return load


@pytest.fixture
def write_images() -> Callable[..., None]:
    """Write `count` random PNGs into each class folder below `folder`."""

    def write(folder: Path, *, count: int, classes: str = "abc", size: tuple[int, int] = (8, 8)) -> None:
        rng = np.random.default_rng(len(str(folder.name)))
        for name in classes:
            (folder / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{number:03}.png")

    return write


@pytest.fixture
def folder(tmp_path: Path, write_images: Callable[..., None]) -> Path:
    """Three classes a, b, c: ten training and four test images of each, 8x8."""
    root = tmp_path / "images"
    write_images(root / "train", count=10)
    write_images(root / "test", count=4)
    return root

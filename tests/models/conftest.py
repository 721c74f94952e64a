"""Model files that the tests of this folder share."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dpm_cli.models import build


@pytest.fixture
def shared_data() -> Path:
    """Real model files and images, where a checkout has them."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("DPM_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no shared data: set DPM_SHARED_DATA")
    return folder


@pytest.fixture
def digits() -> nn.Module:
    """The smallest built-in net, with statistics that are not the initial ones."""
    torch.manual_seed(0)
    module = build("digits", classes=10, shape=(1, 8, 8))
    module(torch.randn(8, 1, 8, 8))  # in training mode: running statistics move
    return module.eval()


class Booby:
    """Creates a file when it is unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trap),)


@pytest.fixture
def booby(tmp_path: Path) -> Booby:
    booby = Booby(tmp_path / "sprung")
    pickle.loads(pickle.dumps(booby))
    booby.trap.rmdir()  # it works, so a test that finds nothing there means something
    return booby

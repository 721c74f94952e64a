"""An attacker's view of `dpm`: commands in processes with limits, over files that are made here and never stored."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from attack import Attacker
from digits_recipe import recipe

from dpm_cli.layers.images import Framing
from dpm_cli.models import Metadata, build
from dpm_cli.models.slim import save_slim


@pytest.fixture(scope="session")
def attacker() -> Iterator[Attacker]:
    with Attacker() as attacker:
        yield attacker


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt, model.safetensors, slim.pt and recipe.yaml as they should be."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("sound")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(prune={"target": {"macs": 0.5}, "rounds": 1})))
    torch.manual_seed(0)
    module = build("digits", classes=10, shape=(1, 8, 8)).eval()
    torch.save(module.state_dict(), folder / "model.pt")
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / "model.safetensors")
    metadata = Metadata(10, Framing((1, 8, 8)), mean=(0.0,), std=(1.0,), arch="digits")
    save_slim(folder / "slim.pt", module, metadata=metadata, recipe="", report={})
    return folder


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")

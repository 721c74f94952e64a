"""Deployed files that are not what the recipe says: one line that names it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_recipe import recipe
from torch import nn

import dpm_cli
from dpm_cli.errors import ModelFileError
from dpm_cli.export import torchscript


class Halves(nn.Module):
    """Gives a row for every other image."""

    def forward(self, x: torch.Tensor) -> Any:
        return x.flatten(1)[::2, :10]


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), r"gives \[\d+, 9\] for"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 11)), r"gives \[\d+, 11\] for"),
        (Halves(), r"gives \[\d+, 10\] for"),
        (nn.Identity(), "gives"),
    ],
)
def test_file_with_other_outputs_than_the_recipe_is_named(net: nn.Module, said: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        (tmp_path / "model.ts").write_bytes(torchscript.serialise(net.eval(), torch.zeros(2, 1, 8, 8), {}))
    with pytest.raises(ModelFileError, match=said):
        dpm_cli.evaluate(tmp_path / "model.ts", recipe(), latency=False)


def test_onnx_that_cannot_be_loaded_has_the_runtimes_own_reason(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(100))
    with pytest.raises(ModelFileError, match="no ONNX file that can be run") as error:
        dpm_cli.evaluate(tmp_path / "model.onnx", recipe(), latency=False)
    assert "cannot be pruned" not in str(error.value)

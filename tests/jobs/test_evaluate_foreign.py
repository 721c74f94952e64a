"""Deployed files that are not what the recipe says: one line that names it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_recipe import recipe
from safetensors.torch import save_file
from torch import nn

import dpm_cli
from dpm_cli.errors import ModelFileError, RunError, UsageError
from dpm_cli.export import torchscript
from dpm_cli.models import build


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


@pytest.mark.thorough
def test_onnx_that_cannot_be_loaded_has_the_runtimes_own_reason(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(100))
    with pytest.raises(ModelFileError, match="no ONNX file that can be run") as error:
        dpm_cli.evaluate(tmp_path / "model.onnx", recipe(), latency=False)
    assert "cannot be pruned" not in str(error.value)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_weights_are_called_weights_where_another_runtime_is_asked_for(name: str, tmp_path: Path) -> None:
    save_weights(tmp_path / name)
    with pytest.raises(UsageError, match=f"{name} holds weights, which torch runs: .* files for onnxruntime"):
        dpm_cli.evaluate(tmp_path / name, recipe(), latency=False, runtime="onnxruntime")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_weights_run_where_torch_is_asked_for(name: str, tmp_path: Path) -> None:
    save_weights(tmp_path / name)
    assert dpm_cli.evaluate(tmp_path / name, recipe(), latency=False, runtime="torch").kind == "dense"


def save_weights(path: Path) -> None:
    weights = build("digits", classes=10, shape=(1, 8, 8)).state_dict()
    (save_file if path.suffix == ".safetensors" else torch.save)(weights, path)


class Raises(nn.Module):
    """Raises an error of its own, which TorchScript keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 0:
            raise ValueError("boom")
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("labels", [True, False])
def test_torchscript_that_raises_is_one_line(labels: bool, tmp_path: Path) -> None:
    """Without labels nothing is scored, and its cost is the first that is asked for."""
    torch.jit.script(Raises()).save(tmp_path / "model.ts")
    with pytest.raises(RunError, match=r"model\.ts fails on images of shape \(\d+, 1, 8, 8\): .*boom") as error:
        dpm_cli.evaluate(tmp_path / "model.ts", recipe(data={"labels": labels}, train={"epochs": 0}), trust=True)
    assert "\n" not in str(error.value)


class Undefined(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10] / 0


@pytest.mark.parametrize("format", ["torchscript", "weights"])
def test_logits_that_are_no_numbers_are_not_scored(format: str, tmp_path: Path) -> None:
    net = build("digits", classes=10, shape=(1, 8, 8)).eval()
    net.linear.weight.data.fill_(3e38)  # finite, but no sum of them is
    path = tmp_path / "model.pt"
    torch.save(net.state_dict(), path)
    if format == "torchscript":
        with warnings.catch_warnings(action="ignore"):
            path.write_bytes(torchscript.serialise(Undefined().eval(), torch.zeros(2, 1, 8, 8), {}))
    with pytest.raises(ModelFileError, match="gives logits that are NaN or infinite"):
        dpm_cli.evaluate(path, recipe(), latency=False)

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpm_cli.export import export_model


def tiny_net(classes: int = 4) -> nn.Module:
    """Conv, norm with real statistics, linear; outputs far from zero."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )
    net(torch.randn(16, 3, 8, 8))  # moves the running statistics
    return net


@pytest.fixture
def net() -> nn.Module:
    return tiny_net()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of `tiny_net()`, exported once: the exporter takes a second or two."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_model(
        tiny_net(), torch.randn(1, 3, 8, 8), format="onnx", path=path, metadata={"recipe": "0123", "classes": "4"}
    )
    return path


@pytest.fixture(scope="session")
def torchscript_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchscript") / "model.ts"
    metadata = {"recipe": "0123", "classes": "4"}
    export_model(tiny_net(), torch.randn(1, 3, 8, 8), format="torchscript", path=path, metadata=metadata)
    return path


@pytest.fixture(scope="session")
def pt2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    export_model(
        tiny_net(), torch.randn(1, 3, 8, 8), format="pt2", path=path, metadata={"recipe": "0123", "classes": "4"}
    )
    return path

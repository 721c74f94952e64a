from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpm_cli.errors import ModelFileError, UsageError
from dpm_cli.export import Exact, export_model, open_exported
from dpm_cli.export.runtimes import RUNS, is_installed

openvino = pytest.mark.skipif(not is_installed("openvino"), reason="openvino is not installed")
executorch = pytest.mark.skipif(not is_installed("executorch"), reason="executorch is not installed")
METADATA = {"classes": "4", "mean": "[0.5]"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "name"),
    [
        pytest.param("openvino", "model.xml", marks=openvino),
        pytest.param("executorch", "model.pte", marks=executorch),
    ],
)
def test_file_computes_what_the_model_does(
    net: nn.Module, image: Tensor, tmp_path: Path, format: Exact, name: str
) -> None:
    net.eval()
    made = export_model(net, image, format=format, path=tmp_path / name, metadata=METADATA)
    model = open_exported(made.path)
    images = torch.randn(19, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(images), net(images), rtol=1e-4, atol=1e-5)
    assert (model.format, model.shape) == (format, (3, 8, 8))
    if format == "openvino":
        assert model.metadata == METADATA
    assert made.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


@openvino
def test_openvino_runs_onnx_files(onnx_file: Path) -> None:
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(
        open_exported(onnx_file, runtime="openvino")(images), open_exported(onnx_file)(images), rtol=1e-4, atol=1e-5
    )


@openvino
@pytest.mark.parametrize("content", [b"<?xml version='1.0'?><net name='x' version='11'></net>", b"<net"])
def test_damaged_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.xml").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"model.xml (is no model that OpenVINO can run|takes 0 inputs)"):
        open_exported(tmp_path / "model.xml")


def test_runtime_that_cannot_run_the_file_is_refused(torchscript_file: Path) -> None:
    with pytest.raises(UsageError, match="is a TorchScript file, which onnxruntime cannot run; torch can"):
        open_exported(torchscript_file, runtime="onnxruntime")


def test_unknown_runtime_is_refused(onnx_file: Path) -> None:
    with pytest.raises(UsageError, match="runtime 'ncnn' is not known; known: torch, onnxruntime"):
        open_exported(onnx_file, runtime="ncnn")


@pytest.mark.parametrize("runtime", ["openvino", "executorch", "tensorrt"])
def test_missing_runtime_is_told_how_to_install(onnx_file: Path, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    monkeypatch.setattr("dpm_cli.export.runtimes.is_installed", lambda _: False)
    with pytest.raises(UsageError, match=f"the runtime {runtime} is not installed: pip install"):
        open_exported(onnx_file, runtime=runtime)


@pytest.mark.skipif(not is_installed("tensorrt"), reason="ONNX Runtime has no TensorRT here")
def test_tensorrt_runs_onnx_files(onnx_file: Path) -> None:
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(
        open_exported(onnx_file, runtime="tensorrt")(images), open_exported(onnx_file)(images), rtol=1e-2, atol=1e-2
    )


def test_every_format_has_a_runtime() -> None:
    assert set(RUNS) == {"onnx", "openvino", "executorch", "torchscript", "pt2", "weights"}

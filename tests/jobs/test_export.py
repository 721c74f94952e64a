from pathlib import Path

import pytest
import torch
from digits_recipe import recipe

import dpm_cli
from dpm_cli.errors import AccuracyError, DataError, UsageError
from dpm_cli.models import build

pytestmark = pytest.mark.slow  # ONNX exports take seconds


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose int8 file is written, and one beside it that must fail."""
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    net = build("digits", classes=10, shape=(1, 8, 8))
    report = dpm_cli.prune(
        net, recipe(export=["onnx", "onnx-int8"], quantize={"max_drop": 50.0, "images": 32}), output=folder / "out"
    )
    int8 = next(made for made in report.exports if made.format == "onnx-int8")
    assert int8.bytes < report.exports[0].bytes < (report.dense.onnx_bytes or 0)
    assert int8.accuracy is not None
    assert int8.latency is not None
    assert int8.runtime == "onnxruntime"
    return folder / "out"


def test_slim_file_knows_its_calibration_images(out: Path, tmp_path: Path) -> None:
    (made,) = dpm_cli.export_slim(out / "slim.pt", formats=["onnx-int8"], output=tmp_path)
    assert made.agreement is not None
    assert (tmp_path / "model.int8.onnx").stat().st_size == made.bytes


def test_missing_calibration_images_are_named_before_anything_is_written(out: Path, tmp_path: Path) -> None:
    changes = ["data.name=folder", f"data.root={tmp_path / 'none'}"]
    with pytest.raises(DataError, match=r"onnx-int8 needs training images.*--set data.root=FOLDER"):
        dpm_cli.export_slim(out / "slim.pt", formats=["onnx-int8"], output=tmp_path, overrides=changes)
    assert list(tmp_path.iterdir()) == []


def test_images_of_another_model_are_refused(out: Path, tmp_path: Path) -> None:
    other = recipe(model={"classes": 9})
    with pytest.raises(UsageError, match=r"the recipe has images of \[1, 8, 8\] in 9 classes"):
        dpm_cli.export_slim(out / "slim.pt", formats=["onnx-int8"], output=tmp_path, recipe=other)


def test_costly_int8_fails_its_export_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build("digits", classes=10, shape=(1, 8, 8))
    with torch.no_grad():  # a huge activation, which the answers ignore, leaves no bits for the others
        net.get_parameter("block2.bn2.weight")[0] = 1e5
        net.get_parameter("linear.weight")[:, 0] = 0
    settings = recipe(
        data={"labels": False},
        export=["onnx-int8"],
        quantize={"max_drop": 0.0, "keep": [], "images": 8},
        train={"epochs": 0},
    )
    report = dpm_cli.prune(net, settings, output=tmp_path / "out")
    assert report.exports == []
    assert any("model.int8.onnx was not written: int8 costs" in note for note in report.notes)
    with pytest.raises(AccuracyError, match="percent of the answers, quantize"):
        dpm_cli.export_slim(tmp_path / "out" / "slim.pt", formats=["onnx-int8"], output=tmp_path)
    assert not (tmp_path / "model.int8.onnx").exists()

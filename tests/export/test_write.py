import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpm_cli.errors import FormatError, RunError, UsageError
from dpm_cli.export import Format, export_model, open_exported, torchscript
from dpm_cli.export.write import portable_copy

FORMATS: list[Format] = ["torchscript", "onnx", "onnx-fp16", "pt2"]


class Branching(nn.Module):
    """Tracing keeps the one branch that the example takes."""

    def forward(self, images: Tensor) -> Tensor:
        return (images if images.sum() > 0 else -images).flatten(1)


class Drawing(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) + torch.rand(1)


class FixedBatch(nn.Module):
    """Tracing freezes the batch of the example."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) + torch.zeros(int(torch.tensor(len(images))), 1)


class TwoOutputs(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.mean((2, 3)), images.amax((2, 3)) + 3


class ByName(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": images.mean((2, 3)), "features": images.flatten(1)}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.thorough
def test_file_agrees_with_the_module_at_any_batch(
    format: Format, net: nn.Module, image: Tensor, tmp_path: Path
) -> None:
    exported = export_model(net, image, format=format, path=tmp_path / "model", metadata={})
    tolerance = 1e-2 if format == "onnx-fp16" else 1e-5
    assert exported.max_difference <= tolerance
    assert exported.bytes == exported.path.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    if format != "pt2":
        model = open_exported(exported.path)
        for batch in (1, 2, 5, 33):
            images = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(model(images), net.eval()(images).detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.thorough
def test_module_is_left_as_it_was(format: Format, net: nn.Module, image: Tensor, tmp_path: Path) -> None:
    net[0].to(memory_format=torch.channels_last)
    net[1].eval()  # a frozen norm in a net that trains
    net[5].weight.requires_grad_(False)
    net(image).sum().backward()
    before = copy.deepcopy(net)
    gradient = net[0].weight.grad
    export_model(net, image, format=format, path=tmp_path / "model", metadata={})
    assert [part.training for part in net.modules()] == [part.training for part in before.modules()]
    assert [each.requires_grad for each in net.parameters()] == [each.requires_grad for each in before.parameters()]
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[0].weight.grad is gradient
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.state_dict().items())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.thorough
def test_nothing_is_printed(
    format: Format, net: nn.Module, image: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_model(net, image, format=format, path=tmp_path / "model", metadata={})
    with pytest.raises(RunError):
        export_model(Drawing(), image, format=format, path=tmp_path / "other", metadata={})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("format", "module"),
    [("torchscript", Branching()), ("torchscript", Drawing()), ("torchscript", FixedBatch()), ("onnx", Drawing())],
)
@pytest.mark.thorough
def test_file_that_computes_something_else_is_refused(
    format: Format, module: nn.Module, image: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"an earlier file")
    with pytest.raises(RunError, match=r"^model was not written: [^\n]+$"):
        export_model(module, image, format=format, path=path, metadata={})
    assert path.read_bytes() == b"an earlier file"
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.thorough
def test_model_that_cannot_be_exported_is_refused_quietly(
    format: Format, image: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match=r"^model was not written: the model cannot be [^\n]+$"):
        export_model(Branching(), image, format=format, path=tmp_path / "model", metadata={})
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_tolerance_is_relative_to_the_largest_output(
    image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(module: nn.Module, example: Tensor, metadata: dict[str, str]) -> bytes:
        return serialise(nn.Sequential(nn.Flatten(), Plus(1.0)), example, metadata)

    class Plus(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, values: Tensor) -> Tensor:
            return values + self.value

    serialise = torchscript.serialise
    monkeypatch.setattr(torchscript, "serialise", off_by_one)
    image[0, 0, 0, 0] = 1e3
    module, path = nn.Flatten(), tmp_path / "model.ts"
    with pytest.raises(RunError, match="differ"):  # noise of about 3 for the other batches: 1 is a third of it
        export_model(module, image, format="torchscript", path=path, metadata={}, tolerance=0.2)
    exported = export_model(module, image, format="torchscript", path=path, metadata={}, tolerance=0.5)
    assert 0.2 < exported.max_difference < 0.5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.every(2)
def test_every_output_is_compared(format: Format, image: Tensor, tmp_path: Path) -> None:
    tolerance = 1e-3 if format == "onnx-fp16" else 1e-6
    for module in (TwoOutputs(), ByName()):
        made = export_model(module, image, format=format, path=tmp_path / "model", metadata={})
        assert made.max_difference < tolerance


def test_outputs_that_are_not_finite_are_refused(image: Tensor, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    nn.init.constant_(module[1].bias, float("nan"))
    with pytest.raises(RunError, match="not finite"):
        export_model(module, image, format="torchscript", path=tmp_path / "model.ts", metadata={})


def test_image_of_the_wrong_shape_is_refused(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"fails on images of shape \(1, 1, 8, 8\)"):
        export_model(net, torch.randn(1, 1, 8, 8), format="onnx", path=tmp_path / "model.onnx", metadata={})
    with pytest.raises(UsageError, match=r"needed is \(1, channels, height, width\)"):
        export_model(net, torch.randn(3, 8, 8), format="onnx", path=tmp_path / "model.onnx", metadata={})


def test_portable_copy_shares_what_was_shared(net: nn.Module) -> None:
    tied = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).to(torch.bfloat16)
    tied[1].weight = tied[0].weight
    copied = portable_copy(tied)
    assert copied[1].weight is copied[0].weight
    assert copied[0].weight is not tied[0].weight
    assert copied[0].weight.dtype == torch.float32
    torch.testing.assert_close(copied[0].weight, tied[0].weight.float())
    assert portable_copy(net)[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.thorough
def test_importing_the_package_does_not_import_onnx() -> None:
    code = "import sys, dpm_cli.export; print(sorted({'onnx', 'onnxruntime', 'onnxscript'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


class Squeezes(nn.Module):
    """Its code takes the axis of a batch of one away, too."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3), keepdim=True).squeeze()


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
@pytest.mark.thorough
def test_a_model_that_squeezes_its_batch_of_one_is_exported(format: Format, image: Tensor, tmp_path: Path) -> None:
    made = export_model(Squeezes(), image, format=format, path=tmp_path / "model", metadata={})
    assert made.max_difference < 1e-6


def test_what_a_trace_fixes_is_the_fault_of_the_format(image: Tensor, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"model.ts was not written"):  # a run goes on to its other formats
        export_model(FixedBatch(), image, format="torchscript", path=tmp_path / "model.ts", metadata={})


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class WithFunction(nn.Module):
    """Its code calls a function of its own."""

    def forward(self, images: Tensor) -> Tensor:
        return Clamp.apply(images).flatten(1)  # type: ignore[no-any-return,no-untyped-call]


@pytest.mark.thorough
def test_a_function_of_the_models_own_is_named_where_a_file_cannot_hold_it(image: Tensor, tmp_path: Path) -> None:
    said = r"model.ts was not written: TorchScript cannot hold Clamp, a torch.autograd.Function .*; ONNX can"
    with pytest.raises(FormatError, match=said):
        export_model(WithFunction(), image, format="torchscript", path=tmp_path / "model.ts", metadata={})
    assert not list(tmp_path.iterdir())
    assert (
        export_model(WithFunction(), image, format="onnx", path=tmp_path / "model.onnx", metadata={}).max_difference
        == 0
    )

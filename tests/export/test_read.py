import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpm_cli.errors import ModelFileError, RunError, UsageError
from dpm_cli.export import export_model, is_program, open_exported
from dpm_cli.export.torchscript import EXTRA
from dpm_cli.measure import count_macs, count_parameters

FORMATS = ["onnx_file", "torchscript_file", "pt2_file"]


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("not a model"),
    "picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "zip": write_zip,
    "state dict": lambda path: torch.save({"weight": torch.zeros(3)}, path),
    "folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_anything_else_is_refused_in_one_line(
    make: Callable[[Path], object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.ts"
    make(path)
    with pytest.raises(ModelFileError, match=r"^[^\n]*model\.ts [^\n]+$"):
        open_exported(path)
    assert capfd.readouterr() == ("", "")


def test_torch_export_archive_needs_trust(pt2_file: Path) -> None:
    with pytest.raises(ModelFileError, match=r"torch.export archive, which may run code[^\n]+--trust"):
        open_exported(pt2_file)


def test_only_programs_are_programs(onnx_file: Path, torchscript_file: Path, pt2_file: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(3)}, weights)
    files = (torchscript_file, pt2_file, onnx_file, weights, tmp_path / "missing.ts")
    assert [is_program(path) for path in files] == [True, True, True, False, False]


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_file_is_refused_in_one_line(
    kind: str, kept: float, request: pytest.FixtureRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = request.getfixturevalue(kind).read_bytes()
    path = tmp_path / "model"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ModelFileError, match=r"^[^\n]+$"):
        open_exported(path, trust=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", FORMATS)
def test_name_of_the_file_does_not_matter(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(request.getfixturevalue(kind).read_bytes())
    model = open_exported(str(path), trust=True)
    assert model.shape == (3, 8, 8)
    assert model.metadata == {"recipe": "0123", "classes": "4"}
    assert model(torch.randn(3, 3, 8, 8)).shape == (3, 4)


@pytest.mark.parametrize("kind", FORMATS)
def test_images_of_the_wrong_shape_are_refused(kind: str, request: pytest.FixtureRequest) -> None:
    model = open_exported(request.getfixturevalue(kind), trust=True)
    with pytest.raises(UsageError, match=r"takes images of shape \(batch, 3, 8, 8\), not \(1, 3, 9, 9\)"):
        model(torch.randn(1, 3, 9, 9))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"metadata": {}, "shape": [3]}', '{"metadata": 1, "shape": [3, 8, 8]}']
)
def test_damaged_metadata_is_refused(content: str, torchscript_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.ts"
    with zipfile.ZipFile(torchscript_file) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith(EXTRA) else old.read(name))
    with pytest.raises(ModelFileError, match=r"damaged TorchScript file \([^\n]+\)$"):
        open_exported(path)


def test_foreign_torchscript_runs_without_metadata_if_it_is_trusted(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "foreign.ts"
    torch.jit.save(torch.jit.script(net.train()), path)
    model = open_exported(path, trust=True)
    assert (model.shape, model.metadata) == (None, {})
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model(images), net.eval()(images).detach())
    with pytest.raises(RunError, match=r"fails on images of shape \(4, 1, 8, 8\): [^\n]+$"):
        model(images[:, :1])


@pytest.mark.parametrize("format", ["torchscript", "pt2"])
def test_torchscript_and_pt2_cost_what_the_module_costs(
    net: nn.Module, format: str, torchscript_file: Path, pt2_file: Path
) -> None:
    file = {"torchscript": torchscript_file, "pt2": pt2_file}[format]
    macs, params = open_exported(file, trust=True).cost((3, 8, 8))
    assert (macs, params) == (count_macs(net, torch.zeros(1, 3, 8, 8)), count_parameters(net))


def test_onnx_file_costs_what_the_module_costs_but_for_folded_norms(net: nn.Module, onnx_file: Path) -> None:
    macs, params = open_exported(onnx_file).cost((3, 8, 8))
    assert macs == count_macs(net, torch.zeros(1, 3, 8, 8)) == 3 * 8 * 9 * 64 + 8 * 4
    assert params == 3 * 8 * 9 + 8 + 8 * 4 + 4  # weight and bias of the convolution, with the norm in it, and the head


@pytest.mark.thorough
def test_grouped_and_transposed_convolutions_and_matrix_products_are_counted(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(4, 8, 3, groups=4, padding=1)
            self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
            self.head = nn.Linear(6, 5)

        def forward(self, images: Tensor) -> Tensor:
            pixels = self.up(self.depthwise(images)).flatten(2)  # (B, 6, 4 · H · W)
            return self.head((pixels @ pixels.transpose(1, 2)).mean(1))

    model = Mixed().eval()
    export_model(model, torch.randn(1, 4, 5, 5), format="onnx", path=tmp_path / "m.onnx", metadata={})
    macs, params = open_exported(tmp_path / "m.onnx").cost((4, 5, 5))
    assert (macs, params) == (count_macs(model, torch.zeros(1, 4, 5, 5)), count_parameters(model))

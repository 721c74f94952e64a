"""TorchScript that only computes is told from TorchScript that could do anything, before torch opens it."""

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import KINDS
from torch import nn

from dpm_cli.errors import ModelFileError
from dpm_cli.export import open_exported, torchscript
from dpm_cli.export.ours import find_foreign
from dpm_cli.models import build

warnings.filterwarnings("ignore", message=r".*torch\.jit.*")


class WritesFile(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) + torch.from_file("executed", True, 4).sum()


class Loops(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.sum() > -1.0):
            x = x + 1
        return x


class Takes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) + torch.zeros(65536, 65536)[0, 0]


class Prints(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("executed")
        return x.flatten(1)


def scripted(module: nn.Module, path: Path) -> Path:
    """With our metadata, as an attacker would add them."""
    with warnings.catch_warnings(action="ignore"):
        script: Any = torch.jit.script(module)
        torch.jit.save(script, path, _extra_files={"dpm.json": '{"metadata": {}, "shape": [1, 8, 8]}'})  # type: ignore[no-untyped-call]
    return path


@pytest.mark.parametrize("kind", [WritesFile, Loops, Takes, Prints])
def test_torchscript_that_does_more_than_compute_needs_trust(
    kind: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = scripted(kind(), tmp_path / "model.ts")
    with pytest.raises(ModelFileError, match=r"TorchScript that dpm did not write .* --trust"):
        open_exported(path)
    assert open_exported(path, trust=True).format == "torchscript"
    assert not Path("executed").exists()


def changed(source: bytes, path: Path, old: str, new: str) -> Path:
    """Replace text in the code of an archive."""
    with zipfile.ZipFile(io.BytesIO(source)) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as other:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith(".py"):
                content = content.replace(old.encode(), new.encode())
            other.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def own() -> bytes:
    module = build("digits", classes=10, shape=(1, 8, 8)).eval()
    return torchscript.serialise(module, torch.zeros(2, 1, 8, 8), {"arch": "digits"})


@pytest.mark.parametrize(
    "new",
    [
        'torch.from_file("executed", True, 4)', 't = torch\n    t.save(1, "executed")', 'ops.aten.save(1, "executed")',
        "(a, b) = (torch, 1)", "for i in [1]:\n      pass", "while True:\n      pass", 'torch . save(1, "executed")',
        'x.save("executed")', "f = ops.aten.save\n    f(1)", "# comment", 'print("executed")',
        'getattr(torch, "save")(1)', 'f = getattr(ops.aten, "save")',
    ],
)  # fmt: skip
def test_code_with_one_more_line_is_foreign(own: bytes, tmp_path: Path, new: str) -> None:
    path = changed(own, tmp_path / "model.ts", "return ", f"{new}\n    return ")
    assert find_foreign(path)
    with pytest.raises(ModelFileError, match="dpm did not write"):
        open_exported(path)


def test_what_we_export_is_ours(own: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.ts").write_bytes(own)
    assert find_foreign(tmp_path / "model.ts") is None
    assert open_exported(tmp_path / "model.ts").shape == (1, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("arch", KINDS)
def test_exports_of_all_kinds_of_architecture_are_ours(tmp_path: Path, arch: str) -> None:
    module = build(f"torchvision:{arch}", classes=10, shape=(3, 224, 224)).eval()
    (tmp_path / "model.ts").write_bytes(torchscript.serialise(module, torch.zeros(2, 3, 224, 224), {}))
    assert find_foreign(tmp_path / "model.ts") is None


@pytest.mark.parametrize("name", ["extra/dpm.json", "code/bomb.py", "data/0"])
@pytest.mark.thorough
def test_archive_that_unpacks_to_far_more_is_refused(own: bytes, tmp_path: Path, name: str) -> None:
    path = changed(own, tmp_path / "model.ts", "", "")
    with zipfile.ZipFile(path) as archive:
        top = archive.namelist()[0].partition("/")[0]
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{top}/{name}", bytes(100_000_000))
    with pytest.raises(ModelFileError, match="unpacks to"):
        open_exported(path)

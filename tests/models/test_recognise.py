import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from dpm_cli.errors import ModelFileError
from dpm_cli.models.recognise import recognise


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return buffer.getvalue()


FOREIGN = {
    b"": "is empty",
    b"\x89PNG\r\n\x1a\n" + bytes(64): "a PNG picture",
    b"\xff\xd8\xff\xe0" + bytes(64): "a JPEG picture",
    b"GIF89a" + bytes(64): "a GIF picture",
    b"RIFF\0\0\0\0WEBPVP8 ": "a WebP picture",
    b"\x1f\x8b\x08" + bytes(64): "gzip archive; unpack",
    b"\x89HDF\r\n\x1a\n" + bytes(64): "HDF5",
    bytes(257) + b"ustar": "tar archive; unpack",
    b"\x08\x08\x12\x07pytorch\x1a\x062.15.0": "an ONNX model, not the weights that it was exported from",
    b"\x80\x04\x95\x0b\0\0\0\0\0\0\0}\x94.": "a Python pickle that torch.save did not write",
    b"model: {arch: resnet20}\n": "a text file",
    "äöü".encode() * 2000: "a text file",
    b"<!DOCTYPE html><html>404": "a web page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "git lfs pull",
    bytes(range(256)): "not a file of any known model format",
    b"PK\x03\x04" + bytes(64): "is truncated or damaged",
    zipped(): r"torch.save did not write \(it holds nothing\)",
    zipped("word/document.xml", "a.xml"): "torch.save did not write .*word/document.xml",
    zipped("net/data.pkl", "net/constants.pkl"): "a TorchScript archive",
    zipped("net/archive_format", "net/models/model.json"): "a torch.export archive",
    zipped("serialized_exported_program.json"): "a torch.export archive",
}


@pytest.mark.parametrize(("content", "message"), FOREIGN.items())
def test_foreign_file_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        recognise(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no model file"):
        recognise(tmp_path / "absent.pt")
    with pytest.raises(ModelFileError, match=r"no model file|cannot be read"):
        recognise(tmp_path / "nul\0.pt")
    with pytest.raises(ModelFileError, match=r"cannot be read|no model file"):
        recognise(tmp_path / ("long" * 100))
    with pytest.raises(ModelFileError, match="is a folder; name a file"):
        recognise(tmp_path)
    (tmp_path / "slim.pt").touch()
    with pytest.raises(ModelFileError, match=r"did you mean .*slim\.pt"):
        recognise(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="not a regular file"):
        recognise(tmp_path / "pipe")


def test_files_torch_writes_are_recognised(tmp_path: Path) -> None:
    module = nn.Conv2d(1, 2, 3)
    example = torch.zeros(1, 1, 4, 4)
    torch.save(module.state_dict(), tmp_path / "new.pt")
    torch.save(module.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert recognise(tmp_path / "new.pt") == "torch"
    assert recognise(tmp_path / "old.pt") == "torch-legacy"
    torch.jit.trace(module, example).save(tmp_path / "script.pt")
    with pytest.raises(ModelFileError, match="TorchScript"):
        recognise(tmp_path / "script.pt")


@pytest.mark.slow
def test_exported_program_is_recognised(tmp_path: Path) -> None:
    program = torch.export.export(nn.Conv2d(1, 2, 3), (torch.zeros(1, 1, 4, 4),))
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(ModelFileError, match=r"\.pt2"):
        recognise(tmp_path / "model.pt2")


def test_onnx_file_is_recognised_without_its_suffix(tmp_path: Path) -> None:
    import onnx

    graph = onnx.helper.make_graph([], "empty", [], [])
    (tmp_path / "model.pt").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ModelFileError, match="ONNX"):
        recognise(tmp_path / "model.pt")

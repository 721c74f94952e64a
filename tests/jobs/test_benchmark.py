import json
import sys
from pathlib import Path

import onnx
import pytest
import torch

import dpm_cli
from dpm_cli.cli.app import main
from dpm_cli.errors import UsageError
from dpm_cli.models import build


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that takes the mean of each channel."""
    path = tmp_path_factory.mktemp("onnx") / "mean.onnx"
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ReduceMean", ["image", "axes"], ["logits"], "mean", keepdims=0)],
        "net",
        [value("image", onnx.TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [value("logits", onnx.TensorProto.FLOAT, ["batch", 4])],
        [onnx.numpy_helper.from_array(torch.tensor([2, 3]).numpy(), "axes")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_every_file_batch_and_thread_count_is_measured(file: Path) -> None:
    before = torch.get_num_threads()
    rows = dpm_cli.benchmark([file, file], batches=[1, 4], threads=[1, 2], seconds=0.01, turns=2, trust=True)
    one, two = [(1, 1), (4, 1)], [(1, 2), (4, 2)]
    assert [(row.batch, row.threads) for row in rows] == one + one + two + two
    assert all(0 < row.low <= row.median <= row.high for row in rows)
    assert all(row.images_per_second == pytest.approx(1000 * row.batch / row.median) for row in rows)
    assert next(row.faster for row in rows if (row.batch, row.threads) == (4, 2)) == 1.0
    assert {row.runtime for row in rows} == {"onnxruntime"}
    assert torch.get_num_threads() == before


def test_one_thread_is_compared_by_processor_time_and_several_by_the_clock(file: Path) -> None:
    rows = dpm_cli.benchmark([file, file], threads=[1, 2], seconds=0.01, turns=1, trust=True)
    assert rows[1].faster == pytest.approx(rows[0].processor / rows[1].processor)
    assert rows[3].faster == pytest.approx(rows[2].median / rows[3].median)


def test_slim_files_need_nothing_else(tmp_path: Path) -> None:
    net = build("digits", classes=10, shape=(1, 8, 8)).eval()
    dpm_cli.save(net, tmp_path / "slim.pt", arch="digits", shape=(1, 8, 8))
    (row,) = dpm_cli.benchmark([tmp_path / "slim.pt"], seconds=0.01, turns=1)
    assert (row.format, row.runtime, row.bytes) == ("weights", "torch", (tmp_path / "slim.pt").stat().st_size)


def test_slim_files_of_own_code_need_its_name_and_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "net_to_measure", raising=False)
    code = "from dpm_cli.models import build\ndef make(): return build('digits', classes=10, shape=(1, 8, 8))\n"
    (tmp_path / "net_to_measure.py").write_text(code)
    net = build("digits", classes=10, shape=(1, 8, 8)).eval()
    dpm_cli.save(net, "shipped.pt", arch="digits", shape=(1, 8, 8))
    content = torch.load("shipped.pt", weights_only=True)
    torch.save(content | {"arch": "net_to_measure:make"}, "own.pt")
    command = ["benchmark", "own.pt", "shipped.pt", "--seconds", "0.01", "--json"]
    assert main(command) == 2
    assert "give --arch net_to_measure:make" in capsys.readouterr().err
    assert main([*command, "--arch", "net_to_measure:make"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": [0]}, "batch is 0"),
        ({"threads": [-1]}, "threads is -1"),
        ({"seconds": 0.0}, "seconds is 0"),
        ({"runtimes": ["tflite"]}, "runtime 'tflite' is not known"),
        ({"runtimes": ["torch"]}, "is an ONNX file, which torch cannot run"),
    ],
)
def test_bad_options_are_refused(file: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dpm_cli.benchmark([file], trust=True, **options)  # else in a process of its own


def test_weights_without_a_recipe_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(UsageError, match=r"model.pt holds weights .*: give --recipe"):
        dpm_cli.benchmark([tmp_path / "model.pt"])


def test_command_prints_a_table_csv_or_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["benchmark", str(file), "--seconds", "0.01", "--threads", "1", "--trust"]
    assert main(arguments) == 0
    assert "ONNX Runtime" in capsys.readouterr().out
    assert main([*arguments, "--csv"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.startswith("file,format,bytes,runtime,batch,threads,median")
    assert line.startswith(f"{file},onnx,")
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["runtime"] == "onnxruntime"
    assert main([*arguments, "--json", "--csv"]) == 2

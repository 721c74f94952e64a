"""ONNX of strangers: a graph may loop for ever and take all memory, when it is opened and when it runs."""

import contextlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from architectures import KINDS
from attack import bounded
from digits_recipe import recipe
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

import dpm_cli
from dpm_cli.errors import DpmError, ModelFileError, RunError
from dpm_cli.export import onnx as onnx_files
from dpm_cli.export import open_exported
from dpm_cli.export.confined import open_confined
from dpm_cli.export.ours_onnx import find_foreign
from dpm_cli.measure import read_clocks
from dpm_cli.models import build

value, node = helper.make_tensor_value_info, helper.make_node
CLASSIFY = [node("Flatten", ["x"], ["flat"]), node("MatMul", ["flat", "w"], ["y"])]
WEIGHTS = {"w": torch.eye(64)[:, :10]}


def write(path: Path, nodes: list[Any], *, weights: dict[str, torch.Tensor] = WEIGHTS, mark: bool = False) -> Path:
    """A classifier of digits in ten classes, after whatever `nodes` do."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [value("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    if mark:
        helper.set_model_props(model, {"dpm_recipe": "abc"})
    path.write_bytes(model.SerializeToString())
    return path


def loop_for_ever() -> list[Any]:
    body = helper.make_graph(
        [node("Identity", ["go"], ["again"]), node("Add", ["a", "a"], ["b"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("a", TensorProto.FLOAT, None)],
        [value("again", TensorProto.BOOL, []), value("b", TensorProto.FLOAT, None)],
    )
    count = helper.make_tensor("count", TensorProto.INT64, [], [2**62])
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    return [
        node("Flatten", ["x"], ["flat"]),
        node("Constant", [], ["n"], value=count),
        node("Constant", [], ["go"], value=yes),
        node("Loop", ["n", "go", "flat"], ["looped"], body=body),
        node("MatMul", ["looped", "w"], ["y"]),
    ]


def take(numbers: int, *, folded: bool) -> list[Any]:
    """Ask for a tensor of so many numbers; a runtime folds what depends on no input when it opens the file."""
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [2], [1, numbers])
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    start = [node("Constant", [], ["sizes"], value=sizes), node("ConstantOfShape", ["sizes"], ["ones"], value=one)]
    if not folded:
        start = [node("Constant", [], ["sizes"], value=sizes), node("ReduceMean", ["x"], ["mean"], keepdims=0)]
        start += [node("Expand", ["mean", "sizes"], ["ones"])]
    return [
        *start,
        node("Exp", ["ones"], ["large"]),
        node("ReduceMean", ["large"], ["small"], keepdims=0),
        node("Flatten", ["x"], ["flat"]),
        node("Add", ["flat", "small"], ["more"]),
        node("MatMul", ["more", "w"], ["y"]),
    ]


# ------------------------------------------------------------------------------------------------------ ours or not


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ours") / "model.onnx"
    module = build("digits", classes=10, shape=(1, 8, 8)).eval()
    path.write_bytes(onnx_files.serialise(module, torch.zeros(2, 1, 8, 8), {"dpm_recipe": "abc"}, opset=18))
    return path


def test_export_of_this_package_runs_in_this_process(ours: Path) -> None:
    assert find_foreign(ours) is None


def count_images() -> list[Any]:
    """Index the batch by its own numbers, as exports of a pooled channels-last tensor do."""
    start, step = (helper.make_tensor(name, TensorProto.INT64, [], [number]) for name, number in (("s", 0), ("d", 1)))
    return [
        node("Shape", ["x"], ["sizes"], start=0, end=1),
        node("Squeeze", ["sizes"], ["count"]),
        node("Constant", [], ["s"], value=start),
        node("Constant", [], ["d"], value=step),
        node("Range", ["s", "count", "d"], ["numbers"]),
        node("Gather", ["x", "numbers"], ["same"]),
        node("Flatten", ["same"], ["flat"]),
        node("MatMul", ["flat", "w"], ["y"]),
    ]


@pytest.mark.thorough
def test_sizes_that_follow_from_the_batch_are_known(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", count_images(), mark=True)
    assert find_foreign(path) is None
    model = open_exported(path, confined=True)
    assert model.read_clocks is read_clocks  # it runs in this process
    assert model.cost((1, 8, 8)) == (640, 640)


@pytest.mark.slow
@pytest.mark.parametrize("arch", KINDS)
def test_exports_of_all_kinds_of_architecture_run_in_this_process(tmp_path: Path, arch: str) -> None:
    module = build(f"torchvision:{arch}", classes=10, shape=(3, 224, 224)).eval()
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_files.serialise(module, torch.zeros(2, 3, 224, 224), {"dpm_recipe": "abc"}, opset=18))
    assert find_foreign(path) is None
    assert open_exported(path).cost((3, 224, 224))[0] is not None


def keep_all(count: int) -> list[Any]:
    """Make tensors of eight million numbers each, all of which a sum at the end needs."""
    sizes = helper.make_tensor("n", TensorProto.INT64, [3], [1, 64, 1 << 17])
    one = helper.make_tensor("one", TensorProto.INT64, [1], [2])
    start = [node("Constant", [], ["n"], value=sizes), node("Constant", [], ["two"], value=one)]
    start += [node("Flatten", ["x"], ["flat"]), node("Unsqueeze", ["flat", "two"], ["thin"])]
    large = [node("Expand", ["thin", "n"], [f"large{number}"]) for number in range(count)]
    small = [node("ReduceMax", [f"large{number}", "two"], [f"small{number}"], keepdims=0) for number in range(count)]
    total = node("Sum", [f"small{number}" for number in range(count)], ["total"])
    return [*start, *large, *small, total, node("MatMul", ["total", "w"], ["y"])]


def double_texts() -> list[Any]:
    text = helper.make_tensor("t", TensorProto.STRING, [1], [b"ab"])
    doubled = [node("StringConcat", [f"t{i}", f"t{i}"], [f"t{i + 1}"]) for i in range(40)]
    return [node("Constant", [], ["t0"], value=text), *doubled, *CLASSIFY]


def multiply_all() -> list[Any]:
    return [
        node("Flatten", ["x"], ["flat"]),
        node("Einsum", ["flat", "flat", "flat", "flat", "w"], ["y"], equation="ab,ac,ad,ae,ef->af"),
    ]


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (keep_all(20), "too many numbers together"),
        (keep_all(1), "None"),
        (double_texts(), "computes with texts"),
        (multiply_all(), "more than two tensors"),
        (loop_for_ever(), "branches or loops"),
        (take(1 << 40, folded=True), "numbers"),
        (take(1 << 40, folded=False), "numbers"),
        ([node("Own", ["x"], ["y"], domain="evil")], "operators of its own"),
        (
            [node("Flatten", ["x"], ["y"]), *[node("NonZero", ["y"], [f"z{i}"]) for i in range(2)]],
            "not known beforehand",
        ),
    ],
)
def test_mark_alone_makes_no_file_ours(nodes: list[Any], said: str, tmp_path: Path) -> None:
    assert said in str(find_foreign(write(tmp_path / "m.onnx", nodes, mark=True)))
    assert find_foreign(write(tmp_path / "plain.onnx", CLASSIFY, mark=True)) is None
    assert "dpm_recipe" in str(find_foreign(write(tmp_path / "plain.onnx", CLASSIFY)))


def test_weights_in_other_files_are_not_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", CLASSIFY, mark=True)
    model = onnx.load(path)
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../../../etc/passwd")
    path.write_bytes(model.SerializeToString())
    assert find_foreign(path) == "its weights are elsewhere"


def test_what_is_no_onnx_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(bytes(range(256)))
    assert find_foreign(tmp_path / "m.onnx")


# ------------------------------------------------------------------------------------------- a process of its own


@pytest.mark.thorough
def test_sound_file_gives_the_same_in_a_process_of_its_own(tmp_path: Path) -> None:
    path, images = write(tmp_path / "m.onnx", CLASSIFY), torch.randn(3, 1, 8, 8)
    confined, plain = open_exported(path, confined=True), open_exported(path)
    assert confined.outputs.__qualname__ != plain.outputs.__qualname__
    assert torch.equal(confined(images), plain(images))
    assert confined.cost((1, 8, 8)) == plain.cost((1, 8, 8)) == (640, 640)
    assert (confined.shape, confined.metadata) == ((1, 8, 8), {})
    with pytest.raises(RunError, match=r"fails on images of shape"):
        confined.outputs(torch.randn(3, 1, 9, 9))
    assert torch.equal(confined(images), plain(images))  # it goes on


@pytest.mark.thorough
@pytest.mark.parametrize("nodes", [take(1 << 29, folded=True), take(1 << 31, folded=False)], ids=["opened", "run"])
def test_file_that_takes_all_memory_is_one_line(nodes: list[Any], tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", nodes)
    with pytest.raises(DpmError, match=r"m\.onnx") as error:
        dpm_cli.evaluate(path, recipe(), latency=False)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_file_that_loops_for_ever_is_ended(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", loop_for_ever())
    with pytest.raises(RunError, match=r"m\.onnx takes more time .* --trust"):
        dpm_cli.evaluate(path, recipe(), latency=False)


@pytest.mark.thorough
def test_file_that_is_no_onnx_has_the_runtimes_reason(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(100))
    with pytest.raises(ModelFileError, match=r"m\.onnx is no ONNX file that can be run"):
        dpm_cli.predict(tmp_path / "m.onnx", ["picture.png"])


@pytest.mark.thorough
def test_latency_of_a_confined_file_is_that_of_its_process(tmp_path: Path) -> None:
    """This process only waits: by its own processor time a stranger's file seemed fourteen times as fast as ours."""
    weights = {"w": torch.randn(64, 4096), "v": torch.randn(4096, 4096), "u": torch.randn(4096, 10)}
    products = [
        node("MatMul", ["flat", "w"], ["a"]),
        node("MatMul", ["a", "v"], ["b"]),
        node("MatMul", ["b", "u"], ["y"]),
    ]
    nodes = [node("Flatten", ["x"], ["flat"]), *products]
    files = [write(tmp_path / f"{mark}.onnx", nodes, weights=weights, mark=mark) for mark in (True, False)]
    ours, stranger = dpm_cli.benchmark(files, threads=[1], batches=[8], seconds=0.2)
    assert stranger.processor > 0.3 * ours.processor
    assert 1 / 3 < stranger.faster < 3


@pytest.mark.thorough
def test_outputs_without_end_are_one_line(tmp_path: Path) -> None:
    """The process of the file may take gigabytes; this one must not read them."""
    sizes = helper.make_tensor("n", TensorProto.INT64, [2], [1, 70_000_000])
    nodes = [
        node("Constant", [], ["n"], value=sizes),
        node("ReduceMax", ["x"], ["m"], keepdims=0),
        node("Expand", ["m", "n"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes)
    with bounded(path.stat().st_size), pytest.raises(RunError, match=r"m\.onnx gives more than 256 MB of outputs"):
        dpm_cli.evaluate(path, recipe(), latency=False)


LIES = [
    {"took": ["a", None]}, {"took": [[], {}]}, {"took": 5}, {"took": [float("nan"), -1e300]}, {"took": [1]},
    {"metadata": [1]}, {"metadata": 7}, {"shape": [True, 1, 1]}, {"shape": "abc"}, {"macs": True}, {"macs": -1},
    {"error": [1]}, {"error": "SystemExit", "said": 1}, {"arrays": 5}, {"arrays": [["float32", [-1]]]},
    {"arrays": [["float32", [True]]]}, {"arrays": [["object", [1]]]}, {"arrays": [[["float32"], [1]]]},
    {"arrays": [["float32", [1 << 40]]]},
]  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("lie", LIES, ids=str)
def test_process_that_lies_costs_no_more_than_its_file(lie: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """A file that takes its process over may send anything."""
    liar = tmp_path / "liar"
    answer = json.dumps({"arrays": [], **lie}).encode()
    liar.write_text(
        f"#!{sys.executable}\nimport sys\nfor _ in range(9):\n"
        f"  sys.stdout.buffer.write({struct.pack('<I', len(answer)) + answer!r}); sys.stdout.buffer.flush()\n"
        "sys.stdin.buffer.read()\n"
    )
    liar.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(liar))
    with contextlib.suppress(DpmError):
        model = open_confined(tmp_path / "m.onnx", None, 1)
        assert model.cost((1, 8, 8)) == (None, None)
        assert model.outputs(torch.zeros(1, 1, 8, 8)) == []
        assert all(0 <= seconds < 1e9 for seconds in model.read_clocks())


def test_weights_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, and `dpm evaluate model.safetensors` is no program of anybody."""
    monkeypatch.setattr("subprocess.Popen", None)
    state = build("digits", classes=10, shape=(1, 8, 8)).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("model.safetensors", "old.pt"):
        assert dpm_cli.evaluate(tmp_path / name, recipe(), latency=False).kind == "dense"

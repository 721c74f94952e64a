from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dpm_cli.errors import ModelFileError, RunError, UsageError
from dpm_cli.export import export_model, open_exported


def save_graph(path: Path, *inputs: tuple[str, int, list[int | str]]) -> Path:
    """A foreign file: the sum of its inputs."""
    values = [onnx.helper.make_tensor_value_info(*each) for each in inputs]
    total = onnx.helper.make_node("Sum", [each[0] for each in inputs], ["y"])
    output = onnx.helper.make_tensor_value_info("y", inputs[0][1], None)
    graph = onnx.helper.make_graph([total], "foreign", values, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


def test_file_has_names_metadata_and_a_dynamic_batch(onnx_file: Path) -> None:
    model = onnx.load(onnx_file)
    assert [each.name for each in model.graph.input] == ["image"]
    assert [each.name for each in model.graph.output] == ["logits"]
    batch, *shape = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch"
    assert [size.dim_value for size in shape] == [3, 8, 8]
    assert {each.key: each.value for each in model.metadata_props} == {"recipe": "0123", "classes": "4"}
    assert [each.version for each in model.opset_import] == [18]


def test_file_does_not_tell_where_it_was_made(onnx_file: Path) -> None:
    content = onnx_file.read_bytes()
    assert b".py" not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_opened_file_knows_its_metadata_and_shape(onnx_file: Path) -> None:
    model = open_exported(onnx_file)
    assert (model.format, model.shape) == ("onnx", (3, 8, 8))
    assert model.metadata == {"recipe": "0123", "classes": "4"}


@pytest.mark.thorough
def test_opset_is_the_one_asked_for_or_refused(net: nn.Module, image: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_model(net, image, format="onnx", path=path, metadata={}, opset=20)
    assert [each.version for each in onnx.load(path).opset_import] == [20]
    with pytest.raises(UsageError, match="opset is 99"):
        export_model(net, image, format="onnx", path=path, metadata={}, opset=99)
    assert [each.version for each in onnx.load(path).opset_import] == [20]


def test_opening_leaves_denormals_as_they_were(onnx_file: Path) -> None:
    tiny = torch.tensor(1e-40)
    try:
        for flush in (True, False):
            torch.set_flush_denormal(flush)
            open_exported(onnx_file)
            assert (tiny * 0.5 == 0) == flush
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    "inputs",
    [
        [("x", onnx.TensorProto.FLOAT, [1, 3, 8, 8])],  # a fixed batch
        [("x", onnx.TensorProto.FLOAT, ["n", 192])],
        [("x", onnx.TensorProto.UINT8, ["n", 3, 8, 8])],
        [("x", onnx.TensorProto.FLOAT, ["n", 3, 8, 8]), ("z", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])],
    ],
)
def test_foreign_file_without_a_batch_of_images_is_refused(
    inputs: list[tuple[str, int, list[int | str]]], tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=r"^[^\n]+(needed is|cannot be|can be run)[^\n]+$"):
        open_exported(save_graph(tmp_path / "foreign.onnx", *inputs))


def test_foreign_file_with_free_sizes_runs(tmp_path: Path) -> None:
    model = open_exported(save_graph(tmp_path / "foreign.onnx", ("x", onnx.TensorProto.FLOAT, ["n", 3, "h", "w"])))
    assert (model.shape, model.metadata) == (None, {})
    images = torch.randn(2, 3, 4, 6)
    assert torch.equal(model(images), images)
    with pytest.raises(RunError, match=r"fails on images of shape \(2, 1, 4, 6\): [^\n]+$"):
        model(images[:, :1])


@pytest.mark.thorough
def test_half_precision_halves_the_weights_and_keeps_the_interface(
    onnx_file: Path, net: nn.Module, image: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "model.fp16.onnx"
    made = export_model(net, image, format="onnx-fp16", path=path, metadata={"classes": "4"})
    assert 0 < made.max_difference < 1e-2
    model, full = onnx.load(path), onnx.load(onnx_file)
    kinds = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert [each.type.tensor_type.elem_type for each in (*model.graph.input, *model.graph.output)] == [
        each.type.tensor_type.elem_type for each in (*full.graph.input, *full.graph.output)
    ]
    assert net[0].weight.dtype is torch.float32


class Windows(nn.Module):
    """Attention in windows, over (B, windows, heads, L, D) or (B · windows, L, D), as hiera, nest and SAM have it."""

    def __init__(self, *, one_head: bool, masked: bool) -> None:
        super().__init__()
        self.qkv, self.head = nn.Conv2d(3, 24, 1), nn.Linear(8, 4)
        self.one_head = one_head
        shape = (8, 8) if one_head else (1, 4, 2, 8, 8)
        self.mask = torch.randn(shape) if masked else None

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.qkv(images).flatten(2).unflatten(2, (-1, 8)).unflatten(1, (3, 2, 4))  # (B, 3, 2, 4, windows, 8)
        q, k, v = tokens.permute(1, 0, 4, 2, 5, 3).unbind(0)  # (B, windows, 2, 8, 4)
        q, k, v = (each[:, :4] for each in (q, k, v))
        if self.one_head:
            q, k, v = (each.flatten(0, 2) for each in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, self.mask)
        return self.head(mixed.reshape(images.shape[0], -1, 8).mean(1))


@pytest.mark.thorough
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("one_head", [False, True])
def test_attention_over_three_and_five_axes_is_exported(
    one_head: bool, masked: bool, image: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, attend = Windows(one_head=one_head, masked=masked).eval(), functional.scaled_dot_product_attention
    made = export_model(net, image, format="onnx", path=tmp_path / "model.onnx", metadata={})
    assert made.max_difference < 1e-5
    assert functional.scaled_dot_product_attention is attend

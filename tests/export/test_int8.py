import hashlib
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from dpm_cli.errors import AccuracyError, UsageError
from dpm_cli.export import Calibration, export_int8, open_exported
from dpm_cli.export.int8 import name_weights, quantize
from dpm_cli.recipe.deployment import Quantize

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def calibration(labels: Tensor | None = None, **settings: object) -> Calibration:
    truth = torch.zeros(len(IMAGES), dtype=torch.int64) if labels is None else labels
    return Calibration(
        IMAGES[:16],
        lambda: [(IMAGES, truth)],
        labels is not None,
        Quantize.model_validate({"max_drop": None} | settings),
    )


def answers(path: Path) -> Tensor:
    return open_exported(path)(IMAGES)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_quantized_file_answers_as_the_original(onnx_file: Path, tmp_path: Path, method: str) -> None:
    target = tmp_path / "int8.onnx"
    quantized = quantize(onnx_file, target, calibration(calibrate=method), {})
    exact, rough = answers(onnx_file), answers(target)
    same = (exact.argmax(1) == rough.argmax(1)).double().mean()
    assert quantized.agreement == pytest.approx(100 * same.item())
    assert quantized.drop == pytest.approx(100 - quantized.agreement)  # without labels
    assert 0 < (exact - rough).abs().max() < 0.1 * exact.abs().max()


def test_weights_have_eight_bits_and_a_scale_per_output_channel(onnx_file: Path, tmp_path: Path) -> None:
    quantize(onnx_file, tmp_path / "int8.onnx", calibration(), {})
    graph = onnx.load(tmp_path / "int8.onnx").graph
    stored = {each.name: each for each in graph.initializer}
    kernels = [each for each in stored.values() if len(each.dims) == 4]
    assert [each.data_type for each in kernels] == [onnx.TensorProto.INT8]
    assert list(stored[kernels[0].name.replace("_quantized", "_scale")].dims) == [8]
    assert Counter(node.op_type for node in graph.node)["QuantizeLinear"] > 0


def test_drop_is_measured_by_labels(onnx_file: Path, tmp_path: Path) -> None:
    exact = answers(onnx_file).argmax(1)
    target = tmp_path / "int8.onnx"
    quantized = quantize(onnx_file, target, calibration(exact), {})  # the original is right on every image
    assert quantized.drop == pytest.approx(100 * (answers(target).argmax(1) != exact).double().mean().item())


def test_named_layers_stay_in_float32(onnx_file: Path, tmp_path: Path) -> None:
    quantized = quantize(onnx_file, tmp_path / "int8.onnx", calibration(keep=["0"]), {})
    types = [each.data_type for each in onnx.load(tmp_path / "int8.onnx").graph.initializer if len(each.dims) == 4]
    assert quantized.kept == ("0",)
    assert types == [onnx.TensorProto.FLOAT]


def test_unknown_layer_is_refused(onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"quantize.keep: 'head\*' names no layer; some are 0, 5"):
        quantize(onnx_file, tmp_path / "int8.onnx", calibration(keep=["head*"]), {})


COMPARE = torch.tensor([[1.0, -1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]])  # two of four pixels


def write_outlier_file(path: Path, first: Tensor, last: Tensor) -> Path:
    """Two linear layers. One pixel is huge, so 8 bits are too coarse for the others until a layer has dropped it."""
    node = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("Reshape", ["image", "shape"], ["flat"], "flatten"),
            node("MatMul", ["flat", "first"], ["hidden"], "first"),
            node("MatMul", ["hidden", "last"], ["logits"], "last"),
        ],
        "net",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 1, 2, 2])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 2])],
        [
            onnx.numpy_helper.from_array(torch.tensor([-1, 4]).numpy(), "shape"),
            onnx.numpy_helper.from_array(first.t().contiguous().numpy(), "first"),
            onnx.numpy_helper.from_array(last.t().contiguous().numpy(), "last"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


def outlier_calibration(**settings: object) -> Calibration:
    images = torch.randn(32, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    images[:, 0, 1, 1] = 1e4
    labels = (images[:, 0, 0, 1] > images[:, 0, 0, 0]).long()
    return Calibration(images, lambda: [(images, labels)], True, Quantize.model_validate(settings))


def test_costly_quantization_fails_and_names_its_limit(tmp_path: Path) -> None:
    source = write_outlier_file(tmp_path / "net.onnx", COMPARE, torch.eye(2))
    with pytest.raises(AccuracyError, match=r"int8 costs \d+.\d\d points of validation accuracy.*max_drop allows 1"):
        quantize(source, tmp_path / "int8.onnx", outlier_calibration(keep=[]), {})


def test_most_sensitive_layer_stays_in_float32_if_the_drop_needs_it(tmp_path: Path) -> None:
    source = write_outlier_file(tmp_path / "net.onnx", COMPARE, torch.eye(2))
    quantized = quantize(source, tmp_path / "int8.onnx", outlier_calibration(), {})
    assert quantized.kept == ("first",)
    assert quantized.drop <= 1.0


def test_not_all_layers_stay_in_float32(tmp_path: Path) -> None:
    source = write_outlier_file(tmp_path / "net.onnx", torch.eye(4), COMPARE)  # both layers see the outlier
    with pytest.raises(AccuracyError, match="even with 1 of 2 layers in fp32"):
        quantize(source, tmp_path / "int8.onnx", outlier_calibration(), {})


def test_matrices_are_named_by_their_transposed_weights() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    graph = onnx.numpy_helper.from_array(net[1].weight.detach().t().contiguous().numpy())
    assert name_weights(net)[hashlib.sha256(graph.raw_data).hexdigest()] == "1.weight"


@pytest.mark.slow
def test_export_is_whole_or_not_there(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.int8.onnx"
    made = export_int8(net, IMAGES[:1], path=path, metadata={"classes": "4"}, calibration=calibration())
    assert made.bytes == path.stat().st_size
    assert open_exported(path).metadata == {"classes": "4"}
    wrong = answers(path).argmax(1)  # labels that only the float32 model misses
    strict = calibration((wrong + 1) % 4, max_drop=0.0, keep=[])
    made = export_int8(net, IMAGES[:1], path=path, metadata={}, calibration=strict)
    assert made.quantized is not None
    assert made.quantized.drop <= 0
    path.unlink()
    coarse = Calibration(1e4 * IMAGES, lambda: [(IMAGES, net(IMAGES).argmax(1))], True, Quantize(max_drop=0.0, keep=()))
    with pytest.raises(AccuracyError, match=r"model.int8.onnx was not written: int8 costs"):
        export_int8(net.eval(), IMAGES[:1], path=path, metadata={}, calibration=coarse)
    assert list(tmp_path.iterdir()) == []


def small_transformer(origin: str) -> nn.Module:
    torch.manual_seed(0)
    if origin == "torchvision":
        from torchvision.models import VisionTransformer

        net: nn.Module = VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=7)
        nn.init.normal_(net.heads[0].weight)
        return net.eval()
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=7, **settings)
    return FirstOutput(transformers.ViTForImageClassification(config)).eval()


class FirstOutput(nn.Module):
    """Returns the logits alone, as what is exported does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images).logits
        return logits


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("origin", "layer"),
    [("torchvision", "encoder.layers.encoder_layer_1.mlp.0"), ("transformers", "inner.vit.layers.1.*")],
)
def test_only_products_with_weights_are_quantized_in_transformers(tmp_path: Path, origin: str, layer: str) -> None:
    net = small_transformer(origin)
    made = export_int8(net, IMAGES[:1], path=tmp_path / "int8.onnx", metadata={}, calibration=calibration())
    graph = onnx.load(tmp_path / "int8.onnx").graph
    maker = {output: node for node in graph.node for output in node.output}
    stored = {each.name: each for each in graph.initializer}

    def quantized(name: str) -> bool:
        return name in maker and maker[name].op_type == "DequantizeLinear"

    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    weighted = [node for node in products if quantized(node.input[1]) and maker[node.input[1]].input[0] in stored]
    between = [node for node in products if node not in weighted and node.input[1] not in stored]
    assert len(weighted) >= 8
    assert len(between) == 4  # two of each block's attention
    assert not any(quantized(name) for node in between for name in node.input)
    assert not any(quantized(name) for node in graph.node if node.op_type == "Softmax" for name in node.input)
    assert made.quantized is not None
    exact, rough = net(IMAGES), answers(tmp_path / "int8.onnx")
    assert (exact - rough).abs().max() < 0.1 * exact.abs().max()
    kept = export_int8(net, IMAGES[:1], path=tmp_path / "k.onnx", metadata={}, calibration=calibration(keep=[layer]))
    assert kept.quantized is not None
    assert kept.quantized.kept

"""Quantize an ONNX file to 8-bit integers with onnxruntime.quantization: static, QDQ, one scale per output channel.

Weights are int8 and activations uint8: the pair for which x86 CPUs have instructions. In transformers only products
with weights are quantized, because softmax, norms and products of activations lose accuracy in 8 bits.
"""

import fnmatch
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpm_cli.errors import AccuracyError, RunError, UsageError, listing, one_line
from dpm_cli.export import onnx
from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.noise import quiet
from dpm_cli.measure import keeping_denormals
from dpm_cli.recipe.deployment import Quantize

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # images (B, C, H, W) and labels (B,)

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # operators with weights
FRAGILE = {"Softmax", "LayerNormalization", "Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Erf", "Gelu"}
CALIBRATION_BATCH = 8  # images; histograms keep the activations of one batch in memory
RANKED_IMAGES = 64  # to compare the errors of single layers on
MOST_KEPT = 0.5  # share of the layers that `keep: auto` may leave in fp32


@dataclass(frozen=True)
class Calibration:
    """Holds what quantization needs besides the model."""

    images: Tensor  # (N, C, H, W) training images, normalised
    held_out: Batches  # images to judge the result on
    labelled: bool  # otherwise equal answers are counted instead of correct ones
    settings: Quantize


@dataclass(frozen=True)
class Quantized:
    """Describes a quantized file. Accuracies are in percent of the held-out images."""

    agreement: float  # percent of images with the same answer as the float32 model's
    drop: float  # points of accuracy below the float32 model
    kept: tuple[str, ...]  # layers that stayed in float32


def quantize(source: Path, target: Path, calibration: Calibration, names: Mapping[str, str]) -> Quantized:
    """Quantize the ONNX file `source` into `target`.

    names: of the layers by digest of their transposed weights, see `name_weights`.
    Raises AccuracyError if it loses more than `max_drop`, RunError if it cannot be quantized, UsageError if `keep`
    names no layer.
    """
    with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
        return _Quantizer(source, target, calibration, names, Path(folder) / "ranges.json").run()


def name_weights(module: nn.Module) -> dict[str, str]:
    """Map digests of transposed matrices to the layers that own them; exporters transpose and rename these."""
    matrices = ((name, weight) for name, weight in module.named_parameters() if weight.dim() == 2)
    return {_digest(weight.detach().t().contiguous().numpy().tobytes()): name for name, weight in matrices}


class _Quantizer:
    """Quantizes one file, several times if layers must stay in float32. Activations are measured once."""

    def __init__(
        self, source: Path, target: Path, calibration: Calibration, names: Mapping[str, str], ranges: Path
    ) -> None:
        import onnx as library

        self.source, self.target, self.calibration, self.ranges = source, target, calibration, ranges
        self.settings = calibration.settings
        graph = library.load(source).graph
        weights = {each.name: each for each in graph.initializer}
        self.layers: dict[str, str] = {}  # node -> layer, for all nodes with weights, in order
        self.products: list[str] = []  # products of two activations
        for node in graph.node:
            if node.op_type in WEIGHTED:
                if node.input[1] in weights:
                    self.layers[node.name] = _layer_name(node, weights[node.input[1]], names)
                else:
                    self.products.append(node.name)
        operators = {node.op_type for node in graph.node}
        self.is_transformer = bool(operators & {"Softmax", "LayerNormalization"})
        self.operators = operators & set(WEIGHTED) if self.is_transformer else operators - FRAGILE

    def run(self) -> Quantized:
        settings = self.settings
        if not self.layers:
            raise RunError("no layer has weights that can be quantized")
        exact = onnx.read(self.source)
        wanted, hits = self._answers(exact)
        kept = [] if settings.keep == "auto" else self._match(settings.keep)
        result = self._try(kept, wanted, hits)
        most = max(1, int(len(self.layers) * MOST_KEPT))
        if settings.keep == "auto" and settings.max_drop is not None and result.drop > settings.max_drop:
            ranked, count = self._rank(exact), 1
            while result.drop > settings.max_drop and count <= most:
                result = self._try(ranked[:count], wanted, hits)
                count *= 2
        if settings.max_drop is not None and result.drop > settings.max_drop:
            way_out = (
                f"even with {len(result.kept)} of {len(self.layers)} layers in fp32; raise quantize.max_drop"
                if settings.keep == "auto"
                else "raise quantize.max_drop, or set quantize.keep: auto"
            )
            unit = "points of validation accuracy" if self.calibration.labelled else "percent of the answers"
            raise AccuracyError(
                f"int8 costs {result.drop:.2f} {unit}, quantize.max_drop allows {settings.max_drop:g}: {way_out}, "
                "quantize.images, or choose another quantize.calibrate"
            )
        return result

    def _try(self, kept: Sequence[str], wanted: Tensor, hits: int) -> Quantized:
        """Write the target with some nodes in float32, and judge it. wanted: (N,) answers of the float32 model."""
        self._write(self.target, excluded=[*self.products, *kept])
        answers, own_hits = self._answers(onnx.read(self.target))
        same, images = int((answers == wanted).sum()), len(wanted)
        lost = hits - own_hits if self.calibration.labelled else images - same
        return Quantized(100 * same / images, 100 * lost / images, tuple(self.layers[node] for node in kept))

    def _answers(self, model: ExportedModel) -> tuple[Tensor, int]:
        """Return the answers (N,) to all held-out images, and how many are correct."""
        answers, hits = [], 0
        for images, labels in self.calibration.held_out():
            answers.append(model(images.cpu()).argmax(1))
            hits += int((answers[-1] == labels.cpu()).sum()) if self.calibration.labelled else 0
        if not answers:
            raise RunError("there are no held-out images to judge int8 on: raise data.validation above 0")
        return torch.cat([each.flatten() for each in answers]), hits

    def _rank(self, exact: ExportedModel) -> list[str]:
        """Order the nodes by the error of the outputs when this one alone is quantized, largest first."""
        images = self.calibration.images[:RANKED_IMAGES]
        wanted = exact(images)
        errors: dict[str, float] = {}
        for node in self.layers:
            self._write(self.target, only=[node])
            errors[node] = float((onnx.read(self.target)(images) - wanted).square().sum())
        return sorted(errors, key=lambda node: -errors[node])

    def _match(self, patterns: Iterable[str]) -> list[str]:
        """Return the nodes of the layers that match. Raises UsageError for a pattern without layers."""
        kept: list[str] = []
        for pattern in patterns:
            found = [node for node, layer in self.layers.items() if fnmatch.fnmatchcase(layer, pattern)]
            if not found:
                raise UsageError(f"quantize.keep: {pattern!r} names no layer; some are {listing(self.layers.values())}")
            kept += found
        return kept

    def _write(self, path: Path, *, excluded: Sequence[str] = (), only: Sequence[str] = ()) -> None:
        """Quantize all nodes but some, or only some. Ranges are measured by the first call and read by all others."""
        from onnxruntime import quantization

        settings = self.settings
        method = {
            "minmax": quantization.CalibrationMethod.MinMax,
            "percentile": quantization.CalibrationMethod.Percentile,
            "entropy": quantization.CalibrationMethod.Entropy,
        }[settings.calibrate]
        try:
            with quiet(), keeping_denormals():
                quantization.quantize_static(
                    self.source,
                    path,
                    _Reader(self.calibration.images),
                    quant_format=quantization.QuantFormat.QDQ,
                    op_types_to_quantize=sorted(self.operators),
                    per_channel=True,
                    reduce_range=settings.reduce_range,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                    nodes_to_quantize=list(only),
                    nodes_to_exclude=list(excluded),
                    calibrate_method=method,
                    calibration_cache_path=self.ranges,
                    extra_options={
                        "CalibStridedMinMax": 1,  # batches whose activations are held in memory at a time
                        "CalibPercentile": settings.percentile,
                        "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
                    },
                )
        except Exception as error:  # the float32 file has run before, so this is the quantizer's problem
            raise RunError(f"the model cannot be quantized: {one_line(error, root_cause=True)}") from error


class _Reader:
    """Yields calibration images in batches, as onnxruntime.quantization asks for them."""

    def __init__(self, images: Tensor) -> None:
        self._batches = torch.split(images, CALIBRATION_BATCH)
        self._left: Iterator[Tensor] = iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        images = next(self._left, None)
        return None if images is None else {onnx.INPUT: images.cpu().numpy()}


def _layer_name(node: Any, weight: Any, names: Mapping[str, str]) -> str:
    """Name the layer of a node by its weight, or by the node if no parameter holds the same numbers."""
    own = weight.name if weight.name.endswith(".weight") else names.get(_digest(weight.raw_data), "")
    return str(own.removesuffix(".weight") or node.name)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

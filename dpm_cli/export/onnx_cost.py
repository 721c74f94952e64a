"""Count the multiply-accumulates and weights of an ONNX file from its graph, by the definitions of `measure`."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from dpm_cli.layers.images import Shape

Shapes = dict[str, tuple[int, ...] | None]
NOT_TRAINED = {"BatchNormalization": (3, 4)}  # inputs that are statistics, not parameters


def count_cost(path: Path, shape: Shape) -> tuple[int | None, int]:
    """Return MACs of one image (C, H, W), None if a shape is unknown, and the number of weights in the file.

    Convolutions, matrix products and nothing else count, as in `count_macs`. A file holds a few weights less than the
    module it came from, because exporters fold BatchNorm into convolutions.
    """
    import onnx

    model = onnx.load(path)
    try:
        graph, shapes = infer_shapes(model, shape)
    except (onnx.shape_inference.InferenceError, ValueError):  # a foreign file may contradict itself
        return None, _count_weights(model.graph)
    return count_macs_of(graph, shapes), _count_weights(graph)


def infer_shapes(model: Any, shape: Shape) -> tuple[Any, Shapes]:
    """Return the graph of a ModelProto and the shape of every value in it for one image (C, H, W).

    This changes the model. Raises ValueError or InferenceError for a graph that contradicts itself.
    """
    import onnx

    for size, dimension in zip((1, *shape), model.graph.input[0].type.tensor_type.shape.dim):
        dimension.dim_value = size
    for output in model.graph.output:  # their old symbols would contradict the sizes that follow
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    _fold_sizes_(model.graph, (1, *shape))
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: Shapes = {value.name: _sizes(value) for value in (*inferred.input, *inferred.value_info, *inferred.output)}
    return inferred, shapes | {each.name: tuple(each.dims) for each in inferred.initializer}


def _fold_sizes_(graph: Any, sizes: tuple[int, ...]) -> None:
    """Replace by constants what tells the sizes of the input: shape inference follows them, but not into Range."""
    import onnx

    folded = {graph.input[0].name: np.array(sizes)}  # and what Squeeze makes of them
    for node in list(graph.node):
        if not node.input or node.input[0] not in folded or len(node.output) != 1:
            continue
        numbers = folded[node.input[0]]
        match node.op_type, node.input[0] == graph.input[0].name:
            case "Shape", True:
                bounds = {attribute.name: attribute.i for attribute in node.attribute}
                numbers = numbers[bounds.get("start", 0) : bounds.get("end", len(sizes))]
            case "Squeeze", False if numbers.size == 1:
                numbers = numbers.reshape(())
            case _:
                continue
        folded[node.output[0]] = numbers
        graph.initializer.append(onnx.numpy_helper.from_array(numbers, node.output[0]))
        graph.node.remove(node)


def count_macs_of(graph: Any, shapes: Shapes) -> int | None:
    """Sum the MACs of all operators; None if a shape is unknown."""
    macs: int | None = 0
    for node in graph.node:
        counted = _count_node(node, shapes)
        macs = None if macs is None or counted is None else macs + counted
    return macs


def _count_weights(graph: Any) -> int:
    import onnx

    places = ((node, place) for node in graph.node for place in NOT_TRAINED.get(node.op_type, ()))
    statistics = {node.input[place] for node, place in places if place < len(node.input)}
    numbers = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    return sum(
        math.prod(each.dims)
        for each in graph.initializer
        if each.dims and each.data_type in numbers and each.name not in statistics
    )


def _count_node(node: Any, shapes: Shapes) -> int | None:
    """Return the MACs of one operator; None if a shape that it needs is unknown."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    first, second = (shapes.get(name) for name in node.input[:2])
    output = shapes.get(node.output[0])
    if first is None or second is None or output is None:
        return None
    match node.op_type:
        case "Conv":
            return math.prod(output) * math.prod(second[1:])
        case "ConvTranspose":
            return math.prod(first) * math.prod(second[1:])
        case "Gemm":
            is_transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            return math.prod(output) * first[0 if is_transposed else 1]
        case _:
            return math.prod(output) * first[-1]


def _sizes(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a value; None if any size is unknown."""
    dimensions = value.type.tensor_type.shape.dim if value.type.tensor_type.HasField("shape") else None
    if dimensions is None or not all(dimension.HasField("dim_value") for dimension in dimensions):
        return None
    return tuple(dimension.dim_value for dimension in dimensions)

"""Tell an ONNX graph that takes as much memory and time as its sizes say, as exports of this package do, from others.

ONNX holds no code, but a graph may loop, call itself by functions, read other files as weights, and ask for tensors of
any size. What is found here needs no truth: a file that is taken for a stranger's runs in a process of its own.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpm_cli.export.onnx_cost import count_macs_of, infer_shapes
from dpm_cli.layers.images import Shape

MARK = "dpm_recipe"  # in the metadata of every file that this package writes
MOST_NODES = 100_000
MOST_NUMBERS = 1 << 24  # of all tensors that are needed at one time, for one image: 64 MB, and a batch has a hundred
MOST_WRITTEN = 1 << 32  # numbers of all tensors together, for one image
MOST_MACS = 10**12  # of one image; the largest vision transformers have a fifth
MOST_OF_A_SHAPE = 1 << 12  # bytes of a constant that may be the shape of something
DOMAINS = ("", "ai.onnx")


def find_foreign(path: Path) -> str | None:
    """Say in one line what in an ONNX file this package does not write; None if there is nothing."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
        return _find_odd_part(model) or _find_excess(model)
    except Exception:  # protobuf and shape inference raise a dozen kinds for damaged files
        return "it cannot be read"


def _find_odd_part(model: Any) -> str | None:
    graph = model.graph
    if not any(each.key == MARK for each in model.metadata_props):
        return f"it has no {MARK}"
    if model.functions or any(each.domain not in DOMAINS for each in (*model.opset_import, *graph.node)):
        return "it has functions or operators of its own"
    if len(graph.node) > MOST_NODES:
        return "it has too many operators"
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return "it has branches or loops"
    if graph.sparse_initializer or any(each.external_data for each in graph.initializer):
        return "its weights are elsewhere"
    return None


def _find_excess(model: Any) -> str | None:
    import onnx

    shape = _image_of(model.graph)
    if shape is None:
        return "it does not take one batch of images of one size"
    for each in model.graph.initializer:
        if len(each.raw_data) > MOST_OF_A_SHAPE:
            each.ClearField("raw_data")  # its size is all that is asked for, and inference would copy it
    inferred, shapes = infer_shapes(model, shape)
    for node in inferred.node:
        for name in filter(None, node.output):
            if (sizes := shapes.get(name)) is None:
                return f"the size of {name[:40]!r} is not known beforehand"
            if math.prod(sizes) > MOST_NUMBERS:
                return f"{name[:40]!r} has {math.prod(sizes)} numbers"
    if any(
        each.type.tensor_type.elem_type == onnx.TensorProto.STRING for each in (*inferred.value_info, *inferred.output)
    ):
        return "it computes with texts"  # whose length no shape tells
    if any(node.op_type == "Einsum" and len(node.input) > 2 for node in inferred.node):
        return "it multiplies more than two tensors at once"
    numbers = {name: math.prod(shapes[name] or ()) for node in inferred.node for name in filter(None, node.output)}
    if sum(numbers.values()) > MOST_WRITTEN or _count_alive(inferred, numbers) > MOST_NUMBERS:
        return "its tensors have too many numbers together"
    macs = count_macs_of(inferred, shapes)
    return None if macs is not None and macs <= MOST_MACS else "it computes too much"


def _count_alive(graph: Any, numbers: Mapping[str, int]) -> int:
    """Return the most numbers that are needed at one time. numbers: of the outputs of operators, by name."""
    last = {name: place for place, node in enumerate(graph.node) for name in (*node.output, *node.input)}
    last |= {output.name: len(graph.node) for output in graph.output}
    alive = most = 0
    for place, node in enumerate(graph.node):
        alive += sum(numbers[name] for name in set(node.output) if name)
        most = max(most, alive)
        alive -= sum(numbers.get(name, 0) for name in {*node.input, *node.output} if name and last[name] == place)
    return most


def _image_of(graph: Any) -> Shape | None:
    if len(graph.input) != 1:
        return None
    sizes = [dimension.dim_value for dimension in graph.input[0].type.tensor_type.shape.dim]
    if len(sizes) != 4 or sizes[0] or not all(sizes[1:]):
        return None
    return sizes[1], sizes[2], sizes[3]

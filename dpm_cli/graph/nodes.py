"""Read one node of an exported graph: its operator, layer and arguments, and which nodes share its memory."""

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

PRODUCTS = frozenset("scaled_dot_product_attention matmul bmm baddbmm".split())
RESHAPES = frozenset("view reshape unflatten _unsafe_view".split())
HEAD_LAYOUT = RESHAPES | frozenset(
    "permute transpose select unbind getitem contiguous clone mul div squeeze unsqueeze expand alias "
    "layer_norm rms_norm chunk split add sub neg cat stack slice flatten to _to_copy type_as".split()
)
RETURNS_ITS_INPUT = frozenset(("dropout", "feature_dropout", "alpha_dropout"))  # in eval mode; not in their schemas


def name_of(node: torch.fx.Node) -> str:
    """Return the name of an operator without namespace and overload."""
    return node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else "getitem"


def layer_of(node: torch.fx.Node) -> str:
    """Return the dotted name of the module whose forward called this operator."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(stack.values()):
        name = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path).removeprefix("L.self").removeprefix("L").lstrip(".")
        if name:
            return re.sub(r"@\d+$", "", name.removeprefix("_modules.").replace("._modules.", "."))
    return ""


def in_schema_order(target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Put arguments in schema order and fill in defaults."""
    filled = list(args)
    for argument in target._schema.arguments[len(args) :]:
        filled.append(kwargs.get(argument.name, argument.default_value))
    return tuple(filled)


def tensors_in(meta: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested list."""
    if isinstance(meta, Tensor):
        yield meta
    elif isinstance(meta, list | tuple):
        for item in meta:
            yield from tensors_in(item)


def macs_of(node: torch.fx.Node) -> int:
    """Count the multiply-accumulates of one operator at its present sizes, for operators without a rule."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


def find_head_dims(graph: torch.fx.Graph) -> dict[torch.fx.Node, frozenset[int]]:
    """Map views that lead to attention to the sizes that its two products contract or carry: the head dimensions.

    Walks backwards from every product through operators that only move or scale.
    """
    found: dict[torch.fx.Node, set[int]] = {}
    for product in graph.nodes:
        if product.op != "call_function" or name_of(product) not in PRODUCTS:
            continue
        for operand in [argument for argument in product.args[:3] if isinstance(argument, torch.fx.Node)]:
            shape = getattr(operand.meta.get("val"), "shape", ())
            last = 1 if name_of(product) == "scaled_dot_product_attention" else 2  # of a matrix product: either
            sizes = {int(size) for size in shape[-last:]}
            queue, seen = [operand], {operand}
            while queue:
                node = queue.pop()
                if node.op != "call_function" or not (name_of(node) in HEAD_LAYOUT or _pools_heads(node, shape)):
                    continue
                if name_of(node) in RESHAPES:
                    found.setdefault(node, set()).update(sizes)
                fresh = [source for source in node.all_input_nodes if source not in seen]
                seen.update(fresh)
                queue.extend(fresh)
    return {node: frozenset(sizes) for node, sizes in found.items()}


def _pools_heads(node: torch.fx.Node, shape: Sequence[int]) -> bool:
    """Tell whether a convolution has heads as its batch. shape: (batch, …) of what attention reads."""
    source = node.args[0] if name_of(node) in ("conv1d", "conv2d", "conv3d") else None
    return isinstance(source, torch.fx.Node) and source.meta["val"].shape[0] != shape[0]


def sharing_memory(write: torch.fx.Node) -> set[torch.fx.Node]:
    """Collect the node that is written in place, what it is a view of, and all views of those."""
    family, waiting = set[torch.fx.Node](), [write.args[0]]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, torch.fx.Node) or node in family or node is write:
            continue
        family.add(node)
        if _may_share_memory(node):
            waiting.append(node.args[0])
        waiting += [user for user in node.users if _may_share_memory(user) and user.args[0] is node]
    return family


def _may_share_memory(node: torch.fx.Node) -> bool:
    """Tell whether the result may be the first argument or a view of it."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.arguments:
        return False
    schema = node.target._schema
    return schema.arguments[0].alias_info is not None or schema.name.split("::")[1] in RETURNS_ITS_INPUT

"""Models that nobody would write: whatever their operators and sizes, removal is exact, or they are refused."""

import copy
import operator
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import random_survivors, randomise_
from test_random_nets import BLOCKS, EXAMPLE, RandomNet
from torch import Tensor, fx, nn

from dpm_cli.errors import DpmError
from dpm_cli.graph import Units, compact_, find_groups

UNARY = [torch.sigmoid, torch.relu, torch.exp, torch.abs, torch.cos, F.gelu, torch.neg, torch.square]
BINARY = [operator.add, operator.mul, operator.sub, torch.maximum, torch.minimum, operator.truediv]


class Mixer(nn.Module):
    """Reshape, split, permute and einsum with sizes that are written down, for mutations to change."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter, self.leave, self.channels = nn.Linear(channels, 12), nn.Linear(12, width), width
        self.mix = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.enter(x.flatten(2).mT)
        a, b, c = torch.split(tokens, [4, 4, 4], 2)
        parts = torch.cat([b, torch.sigmoid(c), a], 2).reshape(2, 36, 3, 4).permute(0, 2, 1, 3)
        mixed = torch.einsum("bhnd,hde->bhne", parts, self.mix)
        return self.leave(mixed.permute(0, 2, 1, 3).reshape(2, 36, 12)).permute(0, 2, 1).reshape(2, -1, 6, 6)


def draw_net(draw: random.Random) -> nn.Module:
    kinds = [Mixer, *BLOCKS]
    blocks = [(draw.choice(kinds), draw.randint(4, 6)) for _ in range(draw.randint(1, 3))]
    torch.manual_seed(draw.randrange(2**31))
    return RandomNet(blocks, draw.randrange(5))


def mutate_number(draw: random.Random, value: int) -> int:
    return draw.choice([value + 1, value - 1, 2 * value, value // 2, -1, 0, 1, 2, 3])


def mutate_argument(draw: random.Random, value: Any) -> Any:
    """Change numbers, the order of lists, the letters of an equation."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return mutate_number(draw, value)
    if isinstance(value, str) and "->" in value:
        left, right = value.split("->")
        return left + "->" + "".join(draw.sample(right, len(right)))
    if isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value):
        items = list(value)
        if draw.random() < 0.6:
            draw.shuffle(items)
        else:
            place = draw.randrange(len(items))
            items[place] = mutate_number(draw, items[place])
        return type(value)(items)
    return value


def mutate_(graph: fx.Graph, draw: random.Random) -> None:
    """Change one node: its numbers, its operator, the order of its arguments, or where one comes from."""
    nodes = [node for node in graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    node = draw.choice([node for node in nodes if node.op != "call_module"] or nodes)
    earlier = list(graph.nodes)[: list(graph.nodes).index(node)]
    match draw.choice(["numbers", "numbers", "numbers", "operator", "order", "source", "insert"]):
        case "numbers":
            node.args = tuple(mutate_argument(draw, argument) for argument in node.args)
            node.kwargs = {name: mutate_argument(draw, argument) for name, argument in node.kwargs.items()}
        case "operator" if node.target in UNARY:
            node.target = draw.choice(UNARY)
        case "operator" if node.target in BINARY:
            node.target = draw.choice(BINARY)
        case "order":
            node.args = tuple(draw.sample(node.args, len(node.args)))
        case "source":
            sources = [other for other in earlier if other.op not in ("get_attr", "output")]
            if sources and node.args:
                node.replace_input_with(draw.choice(node.all_input_nodes or [node]), draw.choice(sources))
        case _:
            with graph.inserting_after(node):
                made = graph.call_function(draw.choice(UNARY), (node,))
            for user in [user for user in node.users if user is not made]:
                user.replace_input_with(node, made)


def runs(model: fx.GraphModule) -> bool:
    """Tell whether the mutated code still gives outputs that differ."""
    try:
        model.recompile()
        with torch.no_grad():
            out = copy.deepcopy(model).eval()(EXAMPLE)
        return isinstance(out, Tensor) and bool(out.isfinite().all()) and float(out.std()) > 1e-3
    except Exception:  # whatever torch and Python say about such code
        return False


@pytest.mark.parametrize("seed", range(120))
@pytest.mark.every(24)
def test_a_mutated_model_is_pruned_exactly_or_refused(seed):
    draw = random.Random(seed)
    while True:
        model = fx.symbolic_trace(draw_net(draw).double())
        for _ in range(draw.randint(1, 3)):
            mutate_(model.graph, draw)
        if runs(model):
            break
    randomise_(model, EXAMPLE)
    try:
        groups = find_groups(model, EXAMPLE)
    except DpmError:
        return
    alive = random_survivors(groups, seed)
    for group in groups:
        alive[group.start : group.start + group.least] = True
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    Units(groups, before).scale_(torch.from_numpy(alive).double())
    Units(groups, after).scale_(torch.from_numpy(alive).double())
    compact_(after, groups, alive)
    with torch.no_grad():
        old, new = before(EXAMPLE), after(EXAMPLE)
    assert old.shape == new.shape
    assert float((old - new).abs().max()) <= 1e-9 * float(old.abs().max())
    assert groups.cost.parameters(alive) == sum(parameter.numel() for parameter in after.parameters())

"""Matrix products: linear layers, matmul, einsum and attention."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from dpm_cli.graph.labels import Axes, Ids, Labels, Role, Ties, Value
from dpm_cli.graph.rules.broadcasting import combine
from dpm_cli.graph.rules.registry import Call, keep_whole, rule
from dpm_cli.graph.rules.weights import contract, with_bias


@rule("linear")
def linear(ties: Ties, call: Call) -> Value | list[Value]:
    x, weight, bias = call.args[:3]
    if weight.rank != 2:
        return keep_whole(ties, call, "linear layer without output axis")
    channels, rows, columns = x.along(-1), weight.along(0), weight.along(1)
    if channels is None:
        ties.keep_axis(x, -1, "linear layer over a block of axes")
    contract(ties, channels, columns)
    ties.mark(rows, Role.PRODUCER)
    ties.cost(1, *_sizes(x, range(x.rank - 1)), rows or weight.shape[0], columns or weight.shape[1], rows=rows)
    labels = {axes: block.with_zero(False) for axes, block in x.labels.items() if x.rank - 1 not in axes}
    out = Value(call.shape, {**labels, (x.rank - 1,): rows} if rows else labels)
    return with_bias(ties, out, bias, x.rank - 1)


@rule("addmm")
def addmm(ties: Ties, call: Call) -> Value:
    bias, left, right = call.args[:3]
    return combine(ties, call.shape, [bias, _matmul(ties, call.shape, left, right)], zero="all")


@rule("matmul", "mm", "bmm")
def matmul(ties: Ties, call: Call) -> Value | list[Value]:
    left, right = call.args[:2]
    if min(left.rank, right.rank) < 2:
        return keep_whole(ties, call, "product with a vector")
    return _matmul(ties, call.shape, left, right)


@rule("mv", "dot", "vdot")
def spectral_norm(ties: Ties, call: Call) -> Value | list[Value]:
    """Label the products of u · (W v), by which a spectral norm divides a weight W (arXiv 1802.05957).

    Only its vectors are not zero once a unit is dead, so the columns of W must shrink with it.
    """
    left, vector = call.args[:2]
    if not (left.constant and vector.constant):
        return keep_whole(ties, call, "product with a vector")
    product = combine(ties, left.shape, [left, vector], zero="any")
    last = left.rank - 1
    if product.along(last) is None:
        ties.keep_axis(product, last, "a spectral norm over a block of axes")
    ties.consume(product.along(last))
    ties.mark(left.along(last) if left.rank == 2 else None, Role.READER)
    return Value(call.shape, {axes: labels for axes, labels in product.labels.items() if last not in axes})


@rule("baddbmm")
def baddbmm(ties: Ties, call: Call) -> Value:
    bias, left, right = call.args[:3]
    return combine(ties, call.shape, [bias, _matmul(ties, call.shape, left, right)], zero="all")


def _matmul(ties: Ties, shape: tuple[int, ...], left: Value, right: Value) -> Value:
    """Label (…, m, k) @ (…, k, n): k is contracted; the rest broadcasts like an element-wise product."""
    inner_left, inner_right = left.along(-1), right.along(-2)
    if inner_left and inner_right:
        match left.constant, right.constant:
            case False, False:
                ties.tie(inner_left, inner_right)
                ties.consume(inner_left.with_zero(inner_left.zero | inner_right.zero))
            case True, False:
                ties.read(inner_right, inner_left)
            case _:  # of two weights, either could be the one that dies
                ties.read(inner_left.with_zero(inner_left.zero & (not left.constant)), inner_right)
                ties.mark(inner_left if left.constant else None, Role.CONSUMER)
        if right.constant:
            ties.mark(right.along(-1), Role.PRODUCER)
        if left.constant:
            ties.mark(left.along(-2), Role.PRODUCER)
    else:
        for value, axis in ((left, left.rank - 1), (right, right.rank - 2)):
            ties.fix_axis(value, axis, "contracted with a fixed axis")
    outer = combine(ties, shape, [_summed(left, left.rank - 1), _summed(right, right.rank - 2)], zero="any")
    ties.cost(1, *_sizes(outer, range(outer.rank)), *_sizes(left, [left.rank - 1]))
    return outer


@rule("einsum")
def einsum(ties: Ties, call: Call) -> Value | list[Value]:
    equation, operands = call.args[:2]
    if "." in equation or "->" not in equation:
        return keep_whole(ties, call, "einsum with implicit axes")
    inputs, output = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    units: dict[str, Labels] = {}  # letter -> labels along it, (size,)
    blocks: dict[str, tuple[str, Labels]] = {}  # letter of the units -> the output's letters of their block, its labels
    sizes: dict[str, int] = {}
    for term, value in zip(terms, operands, strict=True):
        sizes.update(zip(term, value.shape, strict=True))
        for axes, labels in value.labels.items():
            letter, block = term[axes[labels.unit_axis]], "".join(term[axis] for axis in axes)
            if len(set(term)) < len(term):
                ties.keep(labels, "einsum over a diagonal")
                continue
            for k in reversed(range(len(block))):
                if block[k] not in output and k != labels.unit_axis:  # a sum within units
                    labels, block = labels.reduced(k), block[:k] + block[k + 1 :]
            along = labels
            for k in reversed(range(len(block))):
                if k != along.unit_axis:
                    along = along.reduced(k)
            if value.constant and letter not in output:
                ties.mark(labels, Role.CONSUMER)
                along = along.with_zero(False)  # the columns of a weight do not die with what they read
            elif value.constant:
                ties.rely(labels)
            if letter in units:
                ties.tie(units[letter], along)
                units[letter] = units[letter].with_zero(units[letter].zero | along.zero)
            else:
                units[letter] = along
            if len(block) > 1:
                blocks[letter] = (block, labels)
    for letter, labels in units.items():
        if any(
            letter in term and not value.tells_units_along(term.index(letter)) for term, value in zip(terms, operands)
        ):
            ties.keep(labels, "meets an axis of fixed size")
        if letter not in output:
            ties.consume(labels)
    for met in _products(terms, output):
        ties.cost(1, *(units.get(letter, sizes[letter]) for letter in met))
    out: dict[Axes, Labels] = {}
    for letter, labels in units.items():
        if letter in blocks and letter in output:
            block, whole = blocks[letter]
            order = sorted(range(len(block)), key=lambda k: output.index(block[k]))
            axes = tuple(output.index(block[k]) for k in order)
            whole = whole.reordered(order)
            out[axes] = whole.with_zero(labels.spread((axes[whole.unit_axis],), whole, axes).zero)
        elif letter in output:
            out[(output.index(letter),)] = labels
    return Value(call.shape, out)


def _products(terms: Sequence[str], output: str) -> Iterator[str]:
    """Yield the letters of every matrix product of an einsum, which contracts from left to right."""
    left = set(terms[0])
    for i, term in enumerate(terms[1:], 1):
        needed = set(output).union(*terms[i + 1 :])
        right = set(term)
        left, right = left & (needed | right), right & (needed | left)  # letters of one alone are summed before
        if (left & right) - needed:
            yield "".join(sorted(left | right))
        left = (left | right) & needed


@rule("scaled_dot_product_attention")
def attention(ties: Ties, call: Call) -> Value:
    query, key, value = call.args[:3]
    length, width = query.shape[-2] * key.shape[-2], query.shape[-1] + value.shape[-1]
    heads = [_heads_of(operand) for operand in (query, key, value)]
    places = {place for place, _ in heads}
    if None in places or len(places) > 1 or len({operand.shape[:-2] for operand in (query, key, value)}) > 1:
        ties.keep_all(call.args, "layout of the attention heads")
        ties.cost(math.prod(query.shape[:-2]) * length, width)
        return Value(call.shape)
    ties.keep_all(call.args[3:], "attention mask")
    place = places.pop()
    assert place is not None
    for operand, (_, labels) in zip((query, key, value), heads):
        ties.tie(heads[0][1], labels)
        for axes, block in operand.labels.items():
            if place not in axes:
                ties.keep(block, "positions attend to one another")
    others = math.prod(size for axis, size in enumerate(query.shape[:-2]) if axis != place)
    ties.cost(others * length * width, heads[0][1])
    block = value.axes_of(place)
    assert block is not None
    return Value(call.shape, {block: value.labels[block]})


def _heads_of(operand: Value) -> tuple[int | None, Ids]:
    """Return which axis of (…, length, dimensions) heads can go along, and their labels: (heads,)."""
    with_dimensions_first = sorted(operand.labels.items(), key=lambda item: operand.rank - 1 not in item[0])
    for axes, labels in with_dimensions_first:
        place = axes[labels.unit_axis]
        if place < operand.rank - 2 and operand.rank - 2 not in axes:
            ids = np.moveaxis(labels.ids, labels.unit_axis, 0).reshape(operand.shape[place], -1)
            return place, ids[:, 0]
    return None, np.zeros(0, np.int64)


def _summed(value: Value, axis: int) -> Value:
    """Sum an axis to size 1. A sum within units (over head dimensions) leaves their labels on the other axes."""
    out = value.collapsed(axis)
    axes = value.axes_of(axis)
    if axes is not None and not value.tells_units_along(axis):
        out.labels[tuple(other for other in axes if other != axis)] = value.labels[axes].reduced(axes.index(axis))
    return out


def _sizes(value: Value, axes: Sequence[int]) -> list[Labels | int]:
    """Return the sizes of some axes as cost factors: labels if they can shrink, numbers if not."""
    wanted, factors = set(axes), list[Labels | int]()
    for block, labels in value.labels.items():
        if set(block) <= wanted:
            factors.append(labels)
            wanted -= set(block)
    return factors + [value.shape[axis] for axis in sorted(wanted)]

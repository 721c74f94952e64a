"""Try removal on a copy without data, before anything is promised.

Labels see the operators, not the Python around them: a `view(b, 12, 64)` with numbers in the code, or a `squeeze()`
that takes one channel too many, only shows when it is run.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dpm_cli.graph.analysis import trace_groups
from dpm_cli.graph.compact import compact_
from dpm_cli.graph.groups import Groups
from dpm_cli.graph.labels import Flags
from dpm_cli.graph.program import Example, run_example
from dpm_cli.graph.shapes import ShapesAlone

BREAKS = "the model's code holds a size that removing its channels would break"
Survives = Callable[[Sequence[int]], bool]  # tells whether these groups can lose units together


def find_groups(
    model: nn.Module, example: Example, keep: Sequence[str] = (), *, prune_embedding: bool = False
) -> Groups:
    """Find all groups of units that can be removed exactly, in the order of the model's layers.

    On a copy, every group loses half of its units, then all but one. Groups that break the code are kept whole; those
    that only break it with their last but one get a lower bound.

    example: inputs with a batch of 2 or more. keep: layer names or patterns whose outputs stay whole.
    prune_embedding: let channels go that layer norms average over; the norms go on counting them as zeros.
    Raises UnsupportedModelError if the model cannot be exported, RecipeError if a pattern names no layer.

        groups = find_groups(model, torch.randn(2, 3, 32, 32), keep=["fc"])
        for group in groups:
            print(group.name, group.size)
    """
    groups = trace_groups(model, example, keep, prune_embedding=prune_embedding)
    rehearsal = Rehearsal(model, example, groups.outputs)
    halves = [group.size - group.size // 2 for group in groups]

    def survives_halved(chosen: Sequence[int]) -> bool:
        return rehearsal.survives(groups, {i: halves[i] for i in chosen})

    broken = _find_broken(survives_halved, [i for i, group in enumerate(groups) if group.size > 1])
    if broken:
        groups = groups.without(dict.fromkeys(broken, BREAKS))
        halves = [group.size - group.size // 2 for group in groups]

    def survives_with(units: int) -> Survives:
        return lambda chosen: rehearsal.survives(groups, {i: min(units, halves[i]) for i in chosen})

    fragile = _find_broken(survives_with(1), [i for i, half in enumerate(halves) if half > 1])
    need_half = set(_find_broken(survives_with(2), fragile))
    return groups.bounded({i: halves[i] if i in need_half else 2 for i in fragile})


def _find_broken(survives: Survives, candidates: Sequence[int]) -> list[int]:
    """Find the candidates that do not survive alone; if the others do not survive together, add more until they do."""
    if not candidates or survives(candidates):
        return []
    broken = list(_find_broken_alone(survives, candidates))
    rest = [i for i in candidates if i not in broken]
    if not survives(rest):
        together: list[int] = []
        for i in rest:
            (together if survives([*together, i]) else broken).append(i)
    return sorted(broken)


def _find_broken_alone(survives: Survives, candidates: Sequence[int]) -> Iterable[int]:
    """Find those that do not survive alone by halving `candidates`, which do not survive together."""
    if len(candidates) == 1:
        yield from candidates
        return
    middle = len(candidates) // 2
    for part in (candidates[:middle], candidates[middle:]):
        if not survives(part):
            yield from _find_broken_alone(survives, part)


class Rehearsal:
    """Runs copies of a model that have shapes, but no data.

    It uses the meta device, which is fast, or fake tensors if a model mixes in tensors of its own or asks for a device.
    """

    def __init__(self, model: nn.Module, example: Example, outputs: Sequence[tuple[int, ...]]) -> None:
        """outputs: the shapes that the dense model gives."""
        self._model, self._example, self._wanted = model, example, list(outputs)
        self._mode: FakeTensorMode | None = None
        self._is_meta_enough: bool | None = None  # not known yet

    def survives(self, groups: Groups, units_left: dict[int, int]) -> bool:
        """Tell whether a forward pass still gives outputs of the same shapes.

        units_left: group number -> how many of its units survive.
        """
        if not units_left:
            return True
        alive: Flags = np.ones(groups.units, bool)
        for i, left in units_left.items():
            group = groups.groups[i]
            alive[group.start : group.start + group.size - left] = False
        if self._runs(groups, alive):
            return True
        if self._is_meta_enough is None:
            self._is_meta_enough = self._runs(groups, np.ones(groups.units, bool))
            if not self._is_meta_enough:
                self._mode = FakeTensorMode(allow_non_fake_inputs=True)
                return self._runs(groups, alive)
        return False

    def _runs(self, groups: Groups, alive: Flags) -> bool:
        slim = self._copy()
        context: AbstractContextManager[Any] = self._mode or nullcontext()
        with context, torch.no_grad():
            compact_(slim, groups, alive)
            try:
                with ShapesAlone():
                    outputs = run_example(slim, tree_map_only(Tensor, self._without_data, self._example))
            except Exception:  # whatever the model's own code raises about a size it does not expect
                return False
        return [tuple(leaf.shape) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)] == self._wanted

    def _copy(self) -> nn.Module:
        """Copy the model without its data, in eval mode."""
        memo: dict[int, Any] = {}
        for parameter in self._model.parameters():
            empty = self._without_data(parameter.detach())
            memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
        for buffer in self._model.buffers():
            memo[id(buffer)] = self._without_data(buffer)
        for module in self._model.modules():  # a dozen empty ones each: most of what there is to copy
            memo.update(
                (id(hooks), hooks) for hooks in vars(module).values() if type(hooks) is OrderedDict and not hooks
            )
        return copy.deepcopy(self._model, memo).eval()

    def _without_data(self, tensor: Tensor) -> Tensor:
        return self._mode.from_tensor(tensor) if self._mode else torch.empty_like(tensor, device="meta")

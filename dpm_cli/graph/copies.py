"""Run copies of a model that have shapes, but no data: a removal can be tried in milliseconds."""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dpm_cli.graph.compact import compact_
from dpm_cli.graph.groups import Groups
from dpm_cli.graph.labels import Flags
from dpm_cli.graph.program import Example, layer_that_raised, run_example
from dpm_cli.graph.shapes import ShapesAlone
from dpm_cli.layers.copyable import drop_histories_

ATOMS = frozenset((int, float, bool, str, bytes, type(None), type, FunctionType, BuiltinFunctionType, torch.dtype))
USUAL_COPYING = {
    name: getattr(nn.Module, name, None)
    for name in ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs_ex__", "__getnewargs__")
}


def copy_module(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """Copy a model with other tensors in the place of some, by their `id`.

    Empty hooks are shared with the model, so register none on the copy: there are a dozen a layer, most of what would
    have to be copied. Layers that do not say themselves how they are copied are copied here: `copy.deepcopy` takes
    several times as long, most of it for numbers and names.
    """
    drop_histories_(model)
    memo: dict[int, Any] = dict(tensors)
    twins: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        attributes = vars(module)
        memo.update((id(hooks), hooks) for hooks in attributes.values() if type(hooks) is OrderedDict and not hooks)
        if _is_its_attributes(type(module)):
            memo[id(module)] = twin = object.__new__(type(module))
            twins.append((attributes, vars(twin)))
    for attributes, copied in twins:
        for name, value in attributes.items():
            copied[name] = _copy(value, memo)
    return copy.deepcopy(model, memo)


def _is_its_attributes(kind: type[nn.Module]) -> bool:
    """Tell whether to copy a layer of this class is to copy its attributes, as for all that torch has itself."""
    is_usual = all(getattr(kind, name, None) is usual for name, usual in USUAL_COPYING.items())
    return is_usual and kind.__setstate__.__module__.startswith("torch.nn.")


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in ATOMS or (kind is tuple and all(type(each) in ATOMS for each in value)):
        return value
    if (known := memo.get(id(value))) is not None:
        return known
    if kind is dict:
        copied = memo[id(value)] = {}
        for key, each in value.items():
            copied[_copy(key, memo)] = _copy(each, memo)
        return copied
    if kind is set and all(type(each) in ATOMS for each in value):
        memo[id(value)] = twin = set(value)
        return twin
    return copy.deepcopy(value, memo)


class Rehearsal:
    """Runs copies of a model that have shapes, but no data.

    It uses the meta device, which is fast, or fake tensors if a model mixes in tensors of its own or asks for a device.
    """

    def __init__(self, model: nn.Module, example: Example, outputs: Sequence[tuple[int, ...]]) -> None:
        """outputs: the shapes that the dense model gives."""
        self._model, self._example, self._wanted = model, example, list(outputs)
        self._mode: FakeTensorMode | None = None
        self._is_meta_enough: bool | None = None  # not known yet
        self._dense_trains: bool | None = None  # not known yet
        self._failed_in = ""  # the layer that raised last
        self._failures: dict[tuple[frozenset[str], bytes], str] = {}  # what was tried, and the layer that raised

    def survives(self, groups: Groups, units_left: dict[int, int], *, trains: bool = False) -> bool:
        """Tell whether a forward pass still gives outputs of the same shapes.

        units_left: group number -> how many of its units survive. trains: try forward and backward in train mode, too,
        unless the dense model fails there (detectors want targets).
        """
        self._failed_in = ""
        if not units_left:
            return True
        alive: Flags = np.ones(groups.units, bool)
        for i, left in units_left.items():
            group = groups.groups[i]
            alive[group.start : group.start + group.size - left] = False
        tried = groups.answering, alive.tobytes()
        if tried in self._failures:
            self._failed_in = self._failures[tried]
            return False
        if not self._gives_same_shapes(groups, alive):
            self._failures[tried] = self._failed_in
            return False
        if not trains or self._trains(groups, alive):
            return True
        if self._dense_trains is None:
            self._dense_trains = self._trains(groups, np.ones(groups.units, bool))
        return not self._dense_trains

    def suspects(self, groups: Groups) -> set[int]:
        """Return the numbers of the groups that have weights or sizes in the layer that raised last.

        If it has none, those of the layer around it, whose code may have handed it the wrong size.
        """
        layer, found = self._failed_in, set[int]()
        while layer and not found:
            found = self._groups_in(groups, layer)
            layer = layer.rpartition(".")[0]
        return found

    def _groups_in(self, groups: Groups, layer: str) -> set[int]:
        touched = [part.units for part in groups.slices if part.tensor.startswith(f"{layer}.")]
        touched += [units for held in groups.numbers if held.layer == layer for units in held.parts]
        touched += [asking.counted() for asking in groups.asking if asking.layer == layer]
        units = np.unique(np.concatenate([each.ravel() for each in touched])) if touched else np.zeros(0, np.int64)
        return set(groups.group_of_unit[units[units < groups.units]].tolist())

    def _gives_same_shapes(self, groups: Groups, alive: Flags) -> bool:
        if self._runs(groups, alive):
            return True
        if self._is_meta_enough is None:
            self._is_meta_enough = self._runs(groups, np.ones(groups.units, bool))
            if not self._is_meta_enough:
                self._mode = FakeTensorMode(allow_non_fake_inputs=True)
                return self._runs(groups, alive)
        return False

    def _runs(self, groups: Groups, alive: Flags) -> bool:
        context: AbstractContextManager[Any] = self._mode or nullcontext()
        slim = self._copy()
        try:
            example = tree_map_only(Tensor, self._without_data, self._example)
            with context, torch.no_grad():
                compact_(slim, groups, alive)
                with ShapesAlone():
                    outputs = run_example(slim, example)
        except Exception as error:  # whatever the model's own code raises about a size it does not expect
            self._failed_in = layer_that_raised(error, slim)
            return False
        return [tuple(leaf.shape) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)] == self._wanted

    def _trains(self, groups: Groups, alive: Flags) -> bool:
        """Tell whether forward and backward run in train mode."""
        context: AbstractContextManager[Any] = self._mode or nullcontext()
        slim = self._copy().train()
        try:
            example = tree_map_only(Tensor, self._without_data, self._example)
            with context, torch.enable_grad():
                compact_(slim, groups, alive)
                with ShapesAlone(trains=True):
                    outputs = run_example(slim, example)
                tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
                torch.autograd.backward(tensors, [torch.empty_like(tensor) for tensor in tensors])
        except Exception as error:  # as above
            self._failed_in = layer_that_raised(error, slim)
            return False
        return True

    def _copy(self) -> nn.Module:
        """Copy the model without its data, in eval mode."""
        tensors: dict[int, Any] = {}
        for parameter in self._model.parameters():
            empty = self._without_data(parameter.detach())
            tensors[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
        for buffer in self._model.buffers():
            tensors[id(buffer)] = self._without_data(buffer)
        return copy_module(self._model, tensors).eval()

    def _without_data(self, tensor: Tensor) -> Tensor:
        return self._mode.from_tensor(tensor) if self._mode else torch.empty_like(tensor, device="meta")

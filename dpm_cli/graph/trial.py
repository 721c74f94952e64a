"""Carry out a removal on copies of a model, compare outputs, and find the groups that change them."""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dpm_cli.graph.compact import compact_
from dpm_cli.graph.copies import copy_module
from dpm_cli.graph.groups import Groups
from dpm_cli.graph.labels import Flags
from dpm_cli.graph.program import Example, run_example
from dpm_cli.graph.search import find_broken
from dpm_cli.layers.modes import in_mode
from dpm_cli.layers.outputs import output_tensors, relative_difference

BREAKS = "the model's code holds a size that removing its channels would break"
CHANGES = "removing its channels would change the outputs: the model's code takes a number from their count"
TOLERANCE = 1e-5  # relative to the largest output; larger differences are judged in double precision
DISTINCT = 1e-2  # what is no rounding, once double precision has shown a change in the same model
UNCLEAR = 1e-3  # what may be rounding as long as double precision does not tell


class Trial:
    """Removes dead units from copies of a model whose dead units are zero. The model itself stays as it is."""

    def __init__(
        self, model: nn.Module, example: Example, groups: Groups, alive: Flags, *, is_dear: bool = False
    ) -> None:
        """alive: (units,) is_dear: double precision takes too long for what may be rounding.

        Raises what the model raises for its example.
        """
        self._model, self._example, self._groups, self._alive = model, example, groups, alive
        self._is_dear = is_dear
        self._has_changed = False
        self.before = outputs_of(model, example)

    @property
    def losing(self) -> list[int]:
        """Return the numbers of the groups that lose units."""
        return [i for i, group in enumerate(self._groups) if not self._alive[group.range].all()]

    def difference(self, chosen: Sequence[int], *, distinct: float = math.inf) -> float:
        """Return the largest relative difference of the outputs when these groups lose their dead units.

        In single precision if that shows none, or one as large as `distinct`, else in double. Infinite if the smaller
        model does not run.
        """
        difference = self._difference_in_single(chosen)
        if self._is_rounding(difference) or not difference < distinct or self._in_double is None:
            return difference
        model, example, before = self._in_double
        return relative_difference(before, outputs_of(self._shrunk(model, chosen), example))

    def is_exact(self, chosen: Sequence[int]) -> bool:
        """Tell whether outputs stay the same when these groups lose their dead units."""
        difference = self.difference(chosen, distinct=DISTINCT if self._has_changed else math.inf)
        is_exact = self._is_rounding(difference)
        self._has_changed |= not is_exact
        return is_exact

    def find_culprits(self) -> dict[int, str]:
        """Find the groups that cannot lose their dead units, by bisection, and the reason for each."""
        found = find_broken(self.is_exact, self.losing, kinds=self._groups.kinds)
        reasons: dict[str, str] = {}  # of each kind
        for i in found:
            kind = self._groups.kinds[i]
            if kind not in reasons:
                reasons[kind] = BREAKS if math.isinf(self._difference_in_single([i])) else CHANGES
        return {i: reasons[self._groups.kinds[i]] for i in found}

    def _difference_in_single(self, chosen: Sequence[int]) -> float:
        try:
            return relative_difference(self.before, outputs_of(self._shrunk(self._model, chosen), self._example))
        except Exception:  # whatever the model's own code raises about a size it does not expect
            return math.inf

    def is_repeatable(self) -> bool:
        """Tell whether the model gives the same outputs again; if not, nothing can be judged by them."""
        return self._is_rounding(relative_difference(self.before, outputs_of(self._model, self._example)))

    def _is_rounding(self, difference: float) -> bool:
        """Tell whether a difference may be rounding for all that is known."""
        if not TOLERANCE < difference <= UNCLEAR:
            return difference <= TOLERANCE
        return self._is_dear or self._in_double is None

    def _shrunk(self, model: nn.Module, chosen: Sequence[int]) -> nn.Module:
        alive = self._alive.copy()
        for i, group in enumerate(self._groups):
            if i not in chosen:
                alive[group.range] = True
        # `compact_` replaces tensors, so the others can be the model's own.
        slim = copy_module(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        compact_(slim, self._groups, alive)
        return slim

    @cached_property
    def _in_double(self) -> tuple[nn.Module, Example, list[Tensor]] | None:
        """Return model, example and outputs in double precision; None if its code does not run there."""
        try:
            model = copy_module(self._model, {}).double()
            example = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, self._example)
            return model, example, outputs_of(model, example)
        except Exception:  # tensors that its code makes in single precision
            return None


def outputs_of(model: nn.Module, example: Example) -> list[Tensor]:
    """Compute outputs in eval mode and full precision."""
    cudnn = torch.backends.cudnn
    exact = cudnn.flags(enabled=cudnn.enabled, allow_tf32=False)  # TF32 alone would cause differences of 1e-3
    with in_mode(model, training=False), torch.no_grad(), exact, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # some models draw numbers in eval mode, too
        return output_tensors(run_example(model, example))

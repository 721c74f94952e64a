"""Play a recorded CUDA graph in place of a model's forward and backward pass, where that is faster.

A small network on a large GPU waits for Python to launch its hundreds of kernels. A CUDA graph launches all of them at
once. It only plays what was recorded: the same shapes, parameters and modes. So a recording belongs to one structure of
a model; make a new `Recorder` after units were removed.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpm_cli.engine.precision import Precision

Forward = Callable[[Tensor], object]
MOST_SHAPES = 2  # of batches: the usual one, and that of a last batch which is not full
TRIALS = 5  # passes to time
TOLERANCE = 0.05  # of the relative distance of gradients: kernels and their order of sums may differ, in 16 bits


class Recorder:
    """Calls a model on the device, from its first batch on through a CUDA graph if that is faster and agrees.

    A model that cannot be recorded, because it waits for the device or because hooks watch its layers, runs as it is.
    """

    def __init__(self, model: nn.Module, precision: Precision, notes: list[str]) -> None:
        """notes: is told why a graph cannot be used."""
        self.model, self._precision, self._notes = model, precision, notes
        self._chosen: dict[object, Forward] = {}

    def __call__(self, images: Tensor) -> object:
        """Map images to outputs in the model's mode, recording gradients if that is on."""
        key = (images.shape, images.dtype, images.stride(), self.model.training, torch.is_grad_enabled())
        if key not in self._chosen:
            self._chosen[key] = self._choose(images) if len(self._chosen) < MOST_SHAPES else self.model
        return self._chosen[key](images)

    def _choose(self, images: Tensor) -> Forward:
        """Return a recording of the model for such images, or the model. Leaves its state and all generators alone."""
        if is_watched(self.model):
            return self.model
        with unchanged(self.model, images.device):
            try:
                with self._precision.autocast(cached=False):  # graphs forbid the cache
                    recording = record(self.model, images)
                    expected, got = (one_pass(each, images, self.model) for each in (self.model, recording))
                    plain, played = (seconds_of(each, images, self.model) for each in (self.model, recording))
                distance = relative_distance(expected, got)
            except RuntimeError as error:  # also out of memory: a recording keeps its own
                self._notes.append(f"no CUDA graph: {str(error).splitlines()[0]}")
                return self.model
        if not distance <= TOLERANCE:  # NaN is no agreement
            self._notes.append(f"no CUDA graph: its outputs and gradients are off by {distance:.2g}")
            return self.model
        return recording if played < plain else self.model


class _Whole(nn.Module):
    """Has its forward method replaced by the recording, so that the model keeps its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> object:
        return self.model(images)


def record(model: nn.Module, images: Tensor) -> Forward:
    """Record forward and backward passes for images (B, C, H, W) like these. Raises RuntimeError.

    Runs the model a few times, in its present mode.
    """
    graphed: Forward = torch.cuda.make_graphed_callables(_Whole(model), (images.clone(),), allow_unused_input=True)
    return graphed


def is_watched(model: nn.Module) -> bool:
    """Tell whether hooks watch any layer: a recording would call them once and never again."""
    return any(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        for layer in model.modules()
    )


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore buffers and generators after trial passes, and leave no gradients."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            model.zero_grad(set_to_none=True)


def one_pass(run: Forward, images: Tensor, model: nn.Module) -> list[Tensor]:
    """Return copies of the outputs of a forward pass and of all gradients of their squares' sum.

    Dropout draws the same numbers each time.
    """
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    outputs = [leaf for leaf in tree_leaves(run(images)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    loss = sum((leaf.float().square().mean() for leaf in outputs), start=torch.zeros((), device=images.device))
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [tensor.detach().float().clone() for tensor in (*outputs, *gradients)]


def relative_distance(expected: list[Tensor], got: list[Tensor]) -> float:
    """Divide the norm of all differences by that of what is expected. Infinite if the shapes differ."""
    if [each.shape for each in expected] != [each.shape for each in got]:
        return float("inf")
    differences = torch.stack([(a - b).square().sum() for a, b in zip(expected, got)]).sum()
    return float((differences / torch.stack([a.square().sum() for a in expected]).sum().clamp_min(1e-30)).sqrt())


def seconds_of(run: Forward, images: Tensor, model: nn.Module) -> float:
    """Return the seconds of a forward and backward pass, the launching of its kernels included."""
    one_pass(run, images, model)
    torch.cuda.synchronize(images.device)
    started = time.perf_counter()
    for _ in range(TRIALS):
        one_pass(run, images, model)
    torch.cuda.synchronize(images.device)
    return (time.perf_counter() - started) / TRIALS

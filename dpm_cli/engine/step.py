"""One training step, and the running loss. Nothing here waits for the device, except an fp16 scaler."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpm_cli.engine.distributed import ALONE, World
from dpm_cli.engine.precision import Precision

Hook = Callable[[], None]

NEVER = torch.iinfo(torch.int64).max


def train_step(
    model: Callable[[Tensor], object],
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    objective: Callable[[object, Tensor], Tensor],
    precision: Precision,
    world: World = ALONE,
    clip_grad: float | None = None,
    before_step: Sequence[Hook] = (),
    after_step: Sequence[Hook] = (),
) -> Tensor:
    """Forward, backward, hooks, clip, step, hooks; returns the loss, detached and on the device.

    `model` maps images to outputs; of several processes, it is what `world.wrap` made. `objective` maps (outputs,
    labels) to a scalar. `before_step` runs in the given order on the raw gradient, unscaled
    and not yet clipped: what reads it comes before what adds to it. `after_step` runs on the stepped weights,
    and not at all when the fp16 scaler skipped the step. `clip_grad` bounds the global L2 norm, penalties included.
    """
    optimizer.zero_grad(set_to_none=True)
    with precision.autocast(), world.normalising():
        outputs = model(images)
        loss = objective(outputs, labels)
    scaler = precision.scaler
    if scaler is None:
        loss.backward()  # type: ignore[no-untyped-call]
    else:
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
    for hook in before_step:
        hook()
    if clip_grad is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip_grad)
    if scaler is None:
        optimizer.step()
        stepped = True
    else:
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        stepped = scaler.get_scale() >= scale  # the scale falls exactly when the step was skipped
    if stepped:
        for hook in after_step:
            hook()
    return loss.detach()


class LossReading(NamedTuple):
    """What a LossMeter saw since its last reset."""

    mean: float  # over images
    images: int
    first_bad_step: int | None  # the first step whose loss was not finite


class LossMeter:
    """The mean loss and the first step that went wrong, kept on the device until `read`."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._first_bad = torch.full((), NEVER, dtype=torch.int64, device=device)
        self._images = 0

    def add_(self, loss: Tensor, *, images: int, step: int) -> None:
        """Count a step's mean loss over `images`. Call after every training step; does not synchronise."""
        self._sum += loss.double() * images
        candidate = torch.where(loss.isfinite(), NEVER, step)  # ()
        self._first_bad = torch.minimum(self._first_bad, candidate)
        self._images += images

    def read(self) -> LossReading:
        """Wait for the device once and say what was seen; a mean of no images is 0."""
        # Both fit into fp64 exactly: steps stay far below 2**53, and NEVER is only compared.
        total, first_bad = torch.stack([self._sum, self._first_bad.double()]).tolist()
        bad = int(first_bad) if first_bad < NEVER else None
        return LossReading(total / max(self._images, 1), self._images, bad)

    def reset_(self) -> None:
        """Start anew, for instance at an epoch's start."""
        self._sum.zero_()
        self._first_bad.fill_(NEVER)
        self._images = 0

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs to go on with the same mean. Waits for the device."""
        return {"sum": self._sum.item(), "images": self._images}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from finite losses: only such are saved."""
        self.reset_()
        self._sum += state["sum"]
        self._images = int(state["images"])


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; waits for the device once. Call before a checkpoint: a gradient can go
    wrong under a finite loss, and would otherwise be saved before the next loss shows it."""
    flags = [tensor.detach().isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())

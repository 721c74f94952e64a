"""Take one training step and track the loss. Only an fp16 scaler waits for the device here."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpm_cli.engine.distributed import ALONE, World
from dpm_cli.engine.layout import lay_out_gradients_
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
    """Run forward, backward, hooks, clip, step, hooks; return the loss, detached and on the device.

    `model` maps images to outputs; with several processes, pass what `world.wrap` returned. `objective` maps (outputs,
    labels) to a scalar. `before_step` hooks run in order on the raw gradient, unscaled and not yet clipped; put hooks
    that read it before those that add to it. `after_step` hooks run on the updated weights, unless the fp16 scaler
    skipped the step. `clip_grad` bounds the global L2 norm, penalties included.
    """
    loss = compute_gradients(model, optimizer, images, labels, objective=objective, precision=precision, world=world)
    for hook in before_step:
        hook()
    if clip_grad is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip_grad)
    if (scaler := precision.scaler) is None:
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
    return loss


def compute_gradients(
    model: Callable[[Tensor], object],
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    objective: Callable[[object, Tensor], Tensor],
    precision: Precision,
    world: World = ALONE,
) -> Tensor:
    """Put the unscaled gradients of a batch in the place of earlier ones; return the loss. Arguments as above."""
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
    if loss.is_cuda:
        lay_out_gradients_(optimizer)
    return loss.detach()


class LossReading(NamedTuple):
    """Holds what a LossMeter saw since its last reset."""

    mean: float  # over images
    images: int
    first_bad_step: int | None  # the first step whose loss was not finite


class LossMeter:
    """Tracks the mean loss and the first non-finite step on the device until `read`."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._first_bad = torch.full((), NEVER, dtype=torch.int64, device=device)
        self._images = 0

    def add_(self, loss: Tensor, *, images: int, step: int) -> None:
        """Add a step's mean loss over `images`. Call after every training step; does not synchronise."""
        self._sum += loss.double() * images
        candidate = torch.where(loss.isfinite(), NEVER, step)  # ()
        self._first_bad = torch.minimum(self._first_bad, candidate)
        self._images += images

    def read(self) -> LossReading:
        """Wait for the device once, and return what was seen; the mean over no images is 0."""
        # Both fit into fp64 exactly: steps stay far below 2**53, and NEVER is only compared.
        total, first_bad = torch.stack([self._sum, self._first_bad.double()]).tolist()
        bad = int(first_bad) if first_bad < NEVER else None
        return LossReading(total / max(self._images, 1), self._images, bad)

    def reset_(self) -> None:
        """Forget all losses, for instance at the start of an epoch."""
        self._sum.zero_()
        self._first_bad.fill_(NEVER)
        self._images = 0

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs to continue the mean. Waits for the device."""
        return {"sum": self._sum.item(), "images": self._images}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from saved losses, which are always finite."""
        self.reset_()
        self._sum += state["sum"]
        self._images = int(state["images"])


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no tensor holds NaN or infinity. Waits for the device once.

    Call before a checkpoint: a bad gradient under a finite loss would be saved before the next loss shows it.
    """
    flags = [tensor.detach().isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())

"""Define the training loss: cross-entropy with soft or mixed labels and auxiliary heads, and distillation."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpm_cli.errors import UnsupportedModelError


def _roll(batch: Tensor) -> Tensor:
    return batch.roll(1, 0)


class Mixed(NamedTuple):
    """Holds blended images, each labelled `share` of its own label and 1 - `share` of its partner's."""

    images: Tensor  # (B, C, H, W)
    labels: Tensor  # (B,)
    partners: Tensor  # (B,)
    share: float


def mixup(
    images: Tensor, labels: Tensor, alpha: float, *, seed: int, step: int, roll: Callable[[Tensor], Tensor] = _roll
) -> Mixed:
    """Blend every image with its neighbour in the batch (mixup, Zhang et al. 2018); share ~ Beta(alpha, alpha).

    Depends on (seed, step) alone. The neighbour is as random as a permutation, since batches are shuffled.
    roll: gives every image its predecessor in the batch, which may be spread over several processes.
    """
    if alpha <= 0:
        return Mixed(images, labels, labels, 1.0)
    share = float(np.random.default_rng((seed, step)).beta(alpha, alpha))
    return Mixed(torch.lerp(roll(images), images, share), labels, roll(labels), share)


def classification_loss(
    outputs: object,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    partners: Tensor | None = None,
    share: float = 1.0,
) -> Tensor:
    """Average cross-entropy in fp32, plus 0.4 × that of one auxiliary head (Inception v3) or 0.3 × of two (GoogLeNet).

    partners, share: mixed labels, as `mixup` returns them.
    """
    logits, auxiliary = _heads(outputs)
    weight = 0.4 if len(auxiliary) == 1 else 0.3
    total = torch.zeros((), device=logits.device)
    for head, head_weight in [(logits, 1.0), *((head, weight) for head in auxiliary)]:
        head = head.float()  # (B, classes)
        loss = F.cross_entropy(head, labels, label_smoothing=label_smoothing)
        if partners is not None and share < 1:
            loss = share * loss + (1 - share) * F.cross_entropy(head, partners, label_smoothing=label_smoothing)
        total = total + head_weight * loss
    return total


def distillation_loss(student: object, teacher: object, temperature: float) -> Tensor:
    """Average T² · KL(teacher ‖ student) over the batch, softened by `temperature` (Hinton et al. 2015, §2)."""
    student_log = F.log_softmax(main_output(student).float() / temperature, dim=1)  # (B, classes)
    teacher_log = F.log_softmax(main_output(teacher).float().detach() / temperature, dim=1)  # (B, classes)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True) * temperature**2


def main_output(outputs: object, *, images: int | None = None) -> Tensor:
    """Find the logits (B, classes) in the outputs of a model. Raises UnsupportedModelError.

    images: B, where it may be one; some models' own `squeeze()` takes the axis of such a batch, too.
    """
    return _heads(outputs, is_one=images == 1)[0]


def _heads(outputs: object, *, is_one: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Split outputs into logits and the logits of auxiliary heads (absent in eval mode)."""
    match outputs:
        case Tensor():
            heads = [outputs]
        case Mapping():
            names = [key for key in outputs if isinstance(outputs[key], Tensor)]
            main = next((key for key in ("logits", "out") if key in names), next(iter(names), None))
            heads = [outputs[key] for key in [main, *(key for key in names if str(key).startswith("aux"))] if key]
        case tuple() | list():
            heads = [head for head in outputs if isinstance(head, Tensor)]
        case _:
            heads = []
    if is_one:
        heads = [head[None] if head.dim() == 1 else head for head in heads]
    if not heads or heads[0].dim() != 2:
        shapes = [tuple(head.shape) for head in heads] or type(outputs).__name__
        raise UnsupportedModelError(
            f"the model returns {shapes}, not logits of shape (batch, classes): classification only, for now"
        )
    # Only a tensor shaped like the logits can be a head; a feature map is not.
    return heads[0], [head for head in heads[1:] if head.shape == heads[0].shape]


def is_at_chance(accuracy: float, *, images: int, classes: int) -> bool:
    """Tell whether an accuracy in percent is what guessing gives, or less: within two standard deviations."""
    chance = 1 / classes
    return accuracy / 100 <= chance + 2 * math.sqrt(chance * (1 - chance) / images)

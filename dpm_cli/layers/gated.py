"""A BatchNorm whose scale is a gate over its whole channel (Gate Decorator, You et al., NeurIPS 2019, §3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_SHIFT = 10.0  # of a gated channel, in standard deviations of its input


class Gated(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm whose weight is a gate over scale and shift: y = weight · (inner · x̂ + bias)."""

    inner: Tensor  # (C,) fixed; 1 unless the shift would be larger than MOST_SHIFT

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        momentum = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a plain mean over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or self.running_mean is None
        tracked = not self.training or self.track_running_stats
        return F.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight * self.inner,
            self.weight * self.bias,
            by_batch,
            momentum,
            self.eps,
        )


class GatedBatchNorm1d(Gated, nn.BatchNorm1d):
    """Of (B, C) or (B, C, L)."""


class GatedBatchNorm2d(Gated, nn.BatchNorm2d):
    """Of (B, C, H, W)."""


class GatedBatchNorm3d(Gated, nn.BatchNorm3d):
    """Of (B, C, D, H, W)."""


GATED: dict[type[nn.Module], type[Gated]] = {
    nn.BatchNorm1d: GatedBatchNorm1d,
    nn.BatchNorm2d: GatedBatchNorm2d,
    nn.BatchNorm3d: GatedBatchNorm3d,
}
PLAIN = {gated: plain for plain, gated in GATED.items()}


@torch.no_grad()
def add_gates_(model: nn.Module) -> list[str]:
    """Turn every trainable BatchNorm into a gated one that computes the same. Returns their names.

    Where |β| > 10 |γ| (γ = 0 among them) the gate is |β|/10 and a fixed inner scale γ/g makes up for it.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and can_be_gated(module):
            scale, shift = module.weight.clone(), module.bias.clone()
            sign = torch.where(scale < 0, -1.0, 1.0)
            gate = torch.where(shift.abs() > MOST_SHIFT * scale.abs(), sign * shift.abs() / MOST_SHIFT, scale)
            divisor = torch.where(gate == 0, 1.0, gate)
            module.__class__ = GATED[type(module)]
            module.register_buffer("inner", torch.where(gate == scale, 1.0, scale / divisor))
            module.weight.copy_(gate)
            module.bias.copy_(shift / divisor)
            names.append(name)
    return names


@torch.no_grad()
def merge_gates_(model: nn.Module) -> None:
    """Turn gated BatchNorms back into plain ones that compute the same."""
    for module in model.modules():
        if isinstance(module, Gated):
            module.bias.mul_(module.weight)
            module.weight.mul_(module.inner)
            del module._buffers["inner"]
            module.__class__ = PLAIN[type(module)]  # type: ignore[assignment]


def can_be_gated(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module) in GATED and isinstance(weight, nn.Parameter) and weight.requires_grad

"""Find the tensors in a model file's content and load them into a dense module of the recipe's architecture."""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpm_cli.errors import ModelFileError, listing

KEYS = ("state_dict", "model_state_dict", "model", "net")  # where training scripts keep the state dict in a checkpoint
WRAPPERS = ("module.", "_orig_mod.", "model.")  # what DataParallel, torch.compile and Lightning put before every name
SHOWN = 5  # keys to list per kind of mismatch


def find_weights(content: Any, path: Path) -> Any:
    """Find the state dict (or the unpickled module) in a file's content. Raises ModelFileError if there is none."""
    if isinstance(content, nn.Module):
        return content
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} holds a {type(content).__name__}, not a state dict")
    inner = next((content[key] for key in KEYS if isinstance(content.get(key), dict | nn.Module)), content)
    if not inner:
        raise ModelFileError(f"{path} holds an empty state dict")
    return inner


def require_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Require a plain dict of plain tensors. Raises ModelFileError that names the first other thing."""
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ModelFileError(
                f"{path} holds no state dict: {str(name)[:80]!r} is a {type(value).__name__}, not a tensor; "
                f"it may be at the top or under {', '.join(KEYS)}"
            )
        if problem := _find_problem(value):
            raise ModelFileError(f"{path}: {name[:80]} is {problem}; save plain dense tensors")
        tensors[name] = value.detach()
    return tensors


def load_weights_(module: nn.Module, tensors: dict[str, Tensor], path: Path, *, arch: str) -> None:
    """Load a dense state dict, whose names may carry the prefixes of wrappers.

    Raises ModelFileError as `require_fit` does.
    """
    module.load_state_dict(require_fit(module, tensors, path, arch=arch))


def require_fit(module: nn.Module, tensors: dict[str, Tensor], path: Path, *, arch: str) -> dict[str, Tensor]:
    """Return a dense state dict under the names of `module`, which may be on the meta device.

    Raises ModelFileError that lists the missing, unexpected and misshapen keys, or names weights that are no fractions.
    """
    expected, counts = module.state_dict(), _counts(module)
    tensors = strip_wrappers(tensors, expected.keys())
    misshapen = [name for name in expected if name in tensors and expected[name].shape != tensors[name].shape]
    missing = [name for name in expected if name not in tensors and name not in counts]
    unexpected = [name for name in tensors if name not in expected]
    problems = [
        f"{len(keys)} {kind} ({shown})"
        for kind, keys, shown in (
            ("missing", missing, _list_keys(missing)),
            ("unexpected", unexpected, _list_keys(unexpected)),
            ("misshapen", misshapen, _list_keys([_compare(name, tensors, expected) for name in misshapen])),
        )
        if keys
    ]
    if problems:
        raise ModelFileError(f"{path} does not fit {arch}: {', '.join(problems)}; check model.arch and model.classes")
    whole = [name for name in expected if name in tensors and _is_whole(tensors[name], expected[name])]
    if whole:
        raise ModelFileError(
            f"{path} holds {tensors[whole[0]].dtype} where {arch} has weights ({_list_keys(whole)}): a quantized model "
            "or a mask; give the weights that it was made from"
        )
    return dict(tensors)  # without the version that a state dict carries, PyTorch fills in missing counts


def _counts(module: nn.Module) -> set[str]:
    """Name the batch counts of BatchNorm layers, which PyTorch before 0.4.1 did not save."""
    layers = module.named_modules()
    return {
        f"{name}.num_batches_tracked" for name, layer in layers if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    }


def _is_whole(tensor: Tensor, expected: Tensor) -> bool:
    """Tell whether a tensor holds whole numbers or truth values in place of fractions."""
    return expected.is_floating_point() and not tensor.is_floating_point()


def find_negative_variance(module: nn.Module) -> str | None:
    """Name a running variance below zero, of which a norm layer would take the root; None if there is none."""
    for name, tensor in module.named_buffers():
        if name.rpartition(".")[2] == "running_var" and bool((tensor < 0).any()):
            return name
    return None


def require_sound(module: nn.Module, path: Path) -> None:
    """Raise ModelFileError that names the first tensor with a NaN or an infinity, or a negative variance."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            broken = int((~torch.isfinite(tensor)).sum())
            raise ModelFileError(f"{path}: {name} holds {broken} NaN or infinite numbers; load an earlier checkpoint")
    if negative := find_negative_variance(module):
        raise ModelFileError(f"{path}: {negative} holds variances below zero; load an earlier checkpoint")


def _find_problem(tensor: Tensor) -> str | None:
    """Say what a tensor is if it cannot be loaded; None if it can."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return "a quantized tensor" if tensor.is_quantized else f"a {tensor.dtype} tensor of layout {tensor.layout}"
    if tensor.device.type != "cpu":
        return f"a tensor without data (device {tensor.device})"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        # an expanded tensor: a few bytes that would become terabytes when copied
        return f"declared {list(tensor.shape)}, larger than its data"
    return None


def strip_wrappers(tensors: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Remove prefixes that all names have, but not those that the module's own names have too."""
    found, own = _find_wrappers(tensors), _find_wrappers(expected)
    length = len(found) - len(own) if found.endswith(own) else 0
    return {name[length:]: tensor for name, tensor in tensors.items()}


def _find_wrappers(names: Collection[str]) -> str:
    shared = os.path.commonprefix(list(names))  # noqa: RUF071  # of names, not of paths
    # At once, because a stranger's names may begin with thousands of them.
    found = re.match(f"(?:{'|'.join(map(re.escape, WRAPPERS))})*", shared)
    return found.group() if found else ""


def _compare(name: str, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    return f"{name}: file {list(tensors[name].shape)}, model {list(expected[name].shape)}"


def _list_keys(names: list[str]) -> str:
    return listing((re.sub(r"\s+", " ", name)[:120] for name in names), SHOWN)

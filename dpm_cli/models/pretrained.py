"""Start from published weights, or from a file whose head knows another number of classes.

torchvision:DEFAULT, torchvision:IMAGENET1K_V2    of the architecture torchvision:NAME; downloaded once
timm:DEFAULT, timm:TAG                            of the architecture timm:NAME, with the extra `timm`
a file                                            a state dict, .safetensors or slim.pt
"""

import contextlib
import io
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpm_cli.errors import ModelFileError, RecipeError, one_line
from dpm_cli.layers.images import Shape
from dpm_cli.models.load import load_model
from dpm_cli.models.outputs import find_failure
from dpm_cli.models.read import read_model_file
from dpm_cli.models.slim_content import is_slim
from dpm_cli.models.weights import find_weights, load_weights_, require_sound, require_tensors, strip_wrappers
from dpm_cli.models.zoo import auxiliary_heads, build, nearest

SOURCES = ("torchvision", "timm")
TIMEOUT_SECONDS = 20.0  # until a silent server is given up


@dataclass(frozen=True)
class Pretrained:
    """A module in eval mode on the CPU, and what was done to its weights, in a sentence for the user."""

    module: nn.Module
    note: str | None = None


def split_published(name: str) -> tuple[str, str] | None:
    """Split `torchvision:NAME` or `timm:NAME[.TAG]`, as a model or as weights; None for a file."""
    source, colon, rest = name.partition(":")
    return (source, rest) if colon and source in SOURCES and not Path(name).exists() else None


def load_pretrained(
    weights: str, *, arch: str, classes: int, shape: Shape, seed: int = 0, trust: bool = False
) -> Pretrained:
    """Build `arch` with these weights; a head of another number of classes is replaced by a new one, drawn by `seed`.

    Raises ModelFileError or RecipeError, each in one line.
    """
    published = split_published(weights)
    if published is None:
        content = read_model_file(Path(weights), trust=trust)
        found = None if is_slim(content) else find_weights(content, Path(weights))
        if not isinstance(found, dict):  # a slim or pickled module keeps its head
            return Pretrained(load_model(weights, arch=arch, classes=classes, shape=shape, trust=trust).module)
        tensors = require_tensors(found, Path(weights))
    else:
        tensors = _fetch(*published, arch=arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of a new head
        module = build(arch, classes=classes, shape=shape)
    return _fill(module, tensors, weights, arch=arch, classes=classes, shape=shape)


def _fill(
    module: nn.Module, tensors: dict[str, Tensor], weights: str, *, arch: str, classes: int, shape: Shape
) -> Pretrained:
    expected = module.state_dict()
    tensors = strip_wrappers(tensors, expected.keys())
    extra = auxiliary_heads(arch)
    tensors = {name: tensor for name, tensor in tensors.items() if not (extra and name.startswith(extra))}
    head = find_head(tensors, expected, classes=classes)
    load_weights_(module, tensors | {name: expected[name] for name in head}, Path(weights), arch=arch)
    require_sound(module, Path(weights))
    module.eval()
    if failure := find_failure(module, shape, classes):
        raise ModelFileError(f"{weights} as {arch}: {failure}; check model.input and model.classes")
    if not head:
        return Pretrained(module)
    layers = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in head))
    before = len(tensors[head[0]])
    return Pretrained(
        module, f"{weights} knows {before} classes, model.classes is {classes}: the head {layers} is new and untrained"
    )


def find_head(tensors: dict[str, Tensor], expected: dict[str, Tensor], *, classes: int) -> list[str]:
    """Find the tensors that differ only in the number of classes, if no others differ in shape; else return none."""
    differing = [name for name in expected if name in tensors and tensors[name].shape != expected[name].shape]
    counts = set()
    for name in differing:
        old, new = tensors[name].shape, expected[name].shape
        if not (len(old) == len(new) and old[1:] == new[1:] and len(new) and new[0] == classes):
            return []
        counts.add(old[0])
    return differing if len(counts) == 1 else []


def _fetch(source: str, tag: str, *, arch: str) -> dict[str, Tensor]:
    """Download published weights, or read them from where they were downloaded to. Raises RecipeError."""
    made_by, _, name = arch.partition(":")
    if made_by != source:
        raise RecipeError(
            f"model.weights is {source}:{tag}, but model.arch is {arch}: give weights of the same library, or a file"
        )
    with _giving_up_on_silence():
        return _fetch_torchvision(name, tag) if source == "torchvision" else _fetch_timm(name, tag)


def _fetch_torchvision(name: str, tag: str) -> dict[str, Tensor]:
    import torchvision.models

    try:
        known = torchvision.models.get_model_weights(name)
    except ValueError:
        raise RecipeError(f"torchvision publishes no weights of {name!r}: check model.arch") from None
    names = list(dict.fromkeys(["DEFAULT", *known.__members__]))
    if tag not in names:
        raise RecipeError(f"model.weights is 'torchvision:{tag}'; {nearest(tag, names, prefix='torchvision:')}")
    weights: Any = getattr(known, tag)
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            tensors: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # of the network, the disk or a damaged file
        raise ModelFileError(
            f"model.weights torchvision:{tag} cannot be loaded ({one_line(error)}): download {weights.url} elsewhere "
            f"and put it at {place}, or give a file as model.weights"
        ) from None
    return tensors


def _fetch_timm(name: str, tag: str) -> dict[str, Tensor]:
    try:
        import timm
    except ImportError:
        raise RecipeError(f"model.weights 'timm:{tag}' needs timm: pip install 'dpm-cli[timm]'") from None
    tags = [each.partition(".")[2] for each in timm.list_models(f"{name}.*", pretrained=True)]
    if tag != "DEFAULT" and tag not in tags:
        names = ["DEFAULT", *tags] if tags else []
        way_out = nearest(tag, names, prefix="timm:") if names else f"timm publishes no weights of {name}"
        raise RecipeError(f"model.weights is 'timm:{tag}'; {way_out}")
    full = name if tag == "DEFAULT" else f"{name}.{tag}"
    try:
        module = timm.create_model(full, pretrained=True)
    except Exception as error:  # of the network, the disk, or for an architecture without weights
        config = timm.get_pretrained_cfg(full)
        file = f"model.safetensors of {config.hf_hub_id}" if config and config.hf_hub_id else f"the weights of {full}"
        raise ModelFileError(
            f"model.weights timm:{tag} cannot be loaded ({one_line(error)}): download {file} elsewhere and give "
            "that file as model.weights, or fill the cache of the Hugging Face hub (~/.cache/huggingface, or $HF_HOME)"
        ) from None
    weights: dict[str, Tensor] = module.state_dict()
    return weights


@contextlib.contextmanager
def _giving_up_on_silence() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

"""Build a freshly initialised module from an architecture's name.

    resnet20 … resnet110, vgg16_bn, vgg19_bn, digits    built in
    torchvision:NAME                                    torchvision's classifiers
    timm:NAME                                           timm's, with the extra `timm`
    package.module:function                             the user's own code

Nothing is downloaded: every module starts with random weights.
"""

import difflib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from dpm_cli.errors import RecipeError, listing, one_line
from dpm_cli.layers.copyable import keep_copyable_
from dpm_cli.layers.images import Shape
from dpm_cli.models.digits import DigitsNet
from dpm_cli.models.own_code import build_from_own_code
from dpm_cli.models.resnet import CifarResNet
from dpm_cli.models.vgg import CifarVGG

BUILT_IN: dict[str, Callable[..., nn.Module]] = {  # called with classes=, channels=
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"vgg{depth}_bn": partial(CifarVGG, depth) for depth in (16, 19)},
    "digits": DigitsNet,
}
AUXILIARY_HEADS = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}  # torchvision; for training only


def build(arch: str, *, classes: int, shape: Shape) -> nn.Module:
    """Build the dense module of an architecture, randomly initialised, in training mode, on the CPU.

    `package.module:function` imports and calls that function: never pass a name that came from a file.
    Raises RecipeError that names the nearest known architectures.

        build("resnet56", classes=10, shape=(3, 32, 32))
        build("torchvision:resnet50", classes=1000, shape=(3, 224, 224))
    """
    source, colon, name = arch.partition(":")
    if not colon:
        return _build_built_in(arch, classes, shape)
    if source == "torchvision":
        return _build_torchvision(name, classes, shape)
    if source == "timm":
        return _build_timm(name, classes, shape)
    return keep_copyable_(build_from_own_code(arch, classes=classes, shape=shape))


def auxiliary_heads(arch: str) -> tuple[str, ...]:
    """Return prefixes of weights that published files hold and `build` leaves out: heads that only training needs."""
    source, _, name = arch.partition(":")
    return AUXILIARY_HEADS.get(name, ()) if source == "torchvision" else ()


def _build_built_in(arch: str, classes: int, shape: Shape) -> nn.Module:
    if arch not in BUILT_IN:
        near = nearest(arch, BUILT_IN)
        others = "torchvision:NAME, timm:NAME or package.module:function"
        raise RecipeError(f"model.arch is {arch!r}, neither a built-in name nor {others}; {near}")
    if arch.startswith("vgg") and min(shape[1:]) < 32:
        raise RecipeError(f"{arch} halves the image five times: model.input is {list(shape)}, it needs 32×32 or more")
    return BUILT_IN[arch](classes=classes, channels=shape[0])


def _build_torchvision(name: str, classes: int, shape: Shape) -> nn.Module:
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known and name in torchvision.models.list_models():
        raise RecipeError(
            f"model.arch is 'torchvision:{name}', which is no image classifier: classification only, for now"
        )
    if name not in known:
        raise RecipeError(f"model.arch is 'torchvision:{name}'; {nearest(name, known, prefix='torchvision:')}")
    if shape[0] != 3:
        raise RecipeError(f"torchvision:{name} takes 3 channels; model.input is {list(shape)}")
    settings: dict[str, Any] = {"num_classes": classes}
    if name in AUXILIARY_HEADS:
        settings |= {"aux_logits": False, "init_weights": False}  # one output; the slow truncated normal is no better
    if name.startswith("vit_"):
        settings["image_size"] = _side(f"torchvision:{name}", shape)
    return _construct(f"torchvision:{name}", lambda: torchvision.models.get_model(name, weights=None, **settings))


def _build_timm(name: str, classes: int, shape: Shape) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise RecipeError(f"model.arch 'timm:{name}' needs timm: pip install 'dpm-cli[timm]'") from None
    known = timm.list_models()
    if name not in known:  # also keeps out hf-hub:… and local-dir:…, which would load files
        raise RecipeError(f"model.arch is 'timm:{name}'; {nearest(name, known, prefix='timm:')}")
    settings: dict[str, Any] = {"num_classes": classes, "in_chans": shape[0]}
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        settings["img_size"] = shape[1:]
    return _construct(f"timm:{name}", lambda: timm.create_model(name, pretrained=False, **settings))


def _construct(arch: str, make: Callable[[], object]) -> nn.Module:
    try:
        module = make()
    except Exception as error:  # what a constructor of another library raises for settings it cannot take
        raise RecipeError(
            f"{arch} cannot be built with this model.classes and model.input: {one_line(error)}"
        ) from None
    assert isinstance(module, nn.Module)
    return module


def _side(arch: str, shape: Shape) -> int:
    """Return the side of a square image. Raises RecipeError for any other."""
    if shape[1] != shape[2]:
        raise RecipeError(f"{arch} takes square images; model.input is {list(shape)}")
    return shape[1]


def nearest(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Say `did you mean 'a', 'b'?` or, if no name is near, list the known names."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(repr(prefix + match) for match in near)}?"
    return f"known: {listing((prefix + match for match in names), shown=10)}"

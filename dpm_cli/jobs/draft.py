"""`dpm init`: write a recipe that runs on the user's own images, by a look at them and at the machine."""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from dpm_cli.data.look import Look, look_at
from dpm_cli.errors import DataError, OutputError, flatten, listing
from dpm_cli.files import require_writable, write_text_atomic
from dpm_cli.layers.images import Shape
from dpm_cli.models import BUILT_IN, build
from dpm_cli.models.metadata import printable_names
from dpm_cli.recipe import Recipe, is_own_code, load_recipe, read_recipe
from dpm_cli.recipe.annotate import editors_line

SMALL = 64  # pixels; images up to here are cropped with padding, larger ones at random areas
USUAL_SIDE = 224  # pixels; what published classifiers take
LEAST_STEPS = 8  # per epoch, where the images suffice
BATCHES = (8, 128)  # smallest and largest
BYTES_PER_VALUE = 800  # of memory for each value of an image in training, as measured for ResNet-50
ATTENTION = ("vit", "swin", "maxvit", "convnext", "deit", "beit", "mixer", "cait", "xcit")  # trained by AdamW

LEFT_OUT = "\0"  # marks a line of the template to leave out
TEMPLATE = """\
# {title}
#
# Images:    {images}
# Classes:   {classes}
# Use:       dpm train --recipe {file} -o model.pt
#            dpm prune model.pt --recipe {file} -o out
#       or:  {published}
# Settings:  chosen by dpm init for these images and this machine; `dpm schema` describes all that there are.
{editors}

model:
  arch: {arch}
  weights: {weights}  # {weights_comment}
  classes: {number}
  input: {input}  # channels, height, width

data:
  name: {name}
  root: {root}
  batch: {batch}  # images per step
  validation: 0.1  # of the training images, for every decision; the test images are used once, at the end
  augment: {augment}  # random changes of training images
  workers: {workers}  # processes that decode images which do not fit in memory

dense: {{{training}}}  # dpm train

prune:
  base: depgraph
  target: {{macs: 0.5}}  # the fraction to keep; or an absolute such as 500M; or params: …
  rounds: auto
  keep: []  # layers to leave whole: names or patterns such as layer4.*

decay: {{steps: auto}}  # optimizer steps in which a chosen unit shrinks to zero

train: {{{training}}}  # while units decay
finetune: {{{training}}}  # the slim model

export: [torchscript, onnx]
seed: 0
"""


@dataclass(frozen=True)
class Machine:
    """What a recipe should fit to."""

    memory: int  # bytes, of the GPU if there is one
    has_gpu: bool
    cores: int

    @classmethod
    def here(cls) -> "Machine":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if torch.cuda.is_available():
            return cls(torch.cuda.get_device_properties(0).total_memory, True, cores)
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # not on every system
            memory = 8 << 30
        return cls(memory, False, cores)


def init(
    data: str | Path,
    *,
    arch: str | None = None,
    weights: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Recipe:
    """Return a recipe that runs on these images, and write it, with comments, to `output`.

        recipe = dpm_cli.init("photos", arch="torchvision:resnet18", output="mine.yaml")

    data: a folder with a folder per class, a CSV or JSON lines file, or a known dataset. arch: by default a network for
    the size of the images. weights: to start from, as `model.weights`. Raises DataError, RecipeError or OutputError.
    """
    text = draft_recipe(str(data), arch=arch, weights=weights, file=str(output or "mine.yaml"))
    recipe = read_recipe(text, name="the draft")  # nothing is written that cannot be read
    if output is None:
        return recipe
    path = Path(output)
    require_writable(path.parent)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists: choose another --output, or --overwrite to replace it")
    write_text_atomic(path, text)
    return load_recipe(path)


def draft_recipe(
    data: str,
    *,
    arch: str | None = None,
    weights: str | None = None,
    shape: Shape | None = None,
    file: str = "mine.yaml",
    machine: Machine | None = None,
) -> str:
    """Write the text of a recipe for these images. Raises DataError or RecipeError.

    shape: of the input, else one that suits the images. file: what it will be called.
    """
    for name in (data, file):
        _require_text(name)
    look, machine = look_at(data), machine or Machine.here()
    arch = arch or choose_arch(look)
    shape = shape or choose_shape(look, arch)
    if not is_own_code(arch):
        with torch.device("meta"):
            build(arch, classes=len(look.classes), shape=shape)  # raises RecipeError for a mistyped name
    return _write(look, machine, arch, shape, weights, file)


def _require_text(name: str) -> None:
    """Raise DataError for a name that no recipe can hold, because it is not text in this locale."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"a recipe cannot hold the name {os.fsencode(name)!r}, which is not text here: set PYTHONUTF8=1 or a UTF-8 "
            "locale, or rename it"
        ) from None


def choose_arch(look: Look) -> str:
    """Choose a network for the size of the images."""
    if look.name == "digits":
        return "digits"
    return "resnet20" if look.side <= 48 else "torchvision:resnet18"


def choose_shape(look: Look, arch: str) -> Shape:
    """Choose the input: the size of the images in steps of 32 pixels, at most 224."""
    if look.root is None:
        side = look.side if arch in BUILT_IN or look.side < 32 else 32
    else:
        side = max(32, min(USUAL_SIDE, look.side // 32 * 32))
    needs = {"torchvision:inception_v3": 96, "torchvision:alexnet": 64}.get(arch, 0)
    is_fixed = any(f":{name}" in arch for name in ATTENTION)  # made for one size of input
    side = USUAL_SIDE if is_fixed else max(side, needs)
    return (3 if arch.startswith("torchvision:") else look.channels, side, side)


def choose_batch(look: Look, shape: Shape, machine: Machine) -> int:
    """Choose a power of two that gives some steps an epoch and fits half of the memory."""
    least, most = BATCHES
    batch, images = most if shape[1] <= SMALL else most // 2, look.images * 9 // 10
    bytes_per_image = BYTES_PER_VALUE * shape[0] * shape[1] * shape[2]
    while batch > least and (images // batch < LEAST_STEPS or batch * bytes_per_image > machine.memory / 2):
        batch //= 2
    return batch


def choose_augment(look: Look, shape: Shape) -> str:
    """Choose the random changes of training images, as YAML."""
    if look.name == "digits":
        return "{crop: 1, flip: false}"  # a mirrored digit is another sign
    return "{resized_crop: true}" if shape[1] > SMALL else "{crop: 4}"


def choose_optimizer(arch: str) -> str:
    """Choose optimizer and learning rate, as YAML."""
    if any(f":{name}" in arch for name in ATTENTION):
        return "optimizer: adamw, lr: 2.0e-4, weight_decay: 0.05, warmup_epochs: 1"
    return "lr: 0.05" if arch in BUILT_IN else "lr: 0.01, weight_decay: 1.0e-4"


def choose_epochs(look: Look, shape: Shape, machine: Machine) -> int:
    """Choose the epochs of each stage: 20 on a GPU; on a CPU what may be waited for."""
    if machine.has_gpu:
        return 20
    work = look.images * shape[1] * shape[2] / USUAL_SIDE**2  # images of the usual size
    return max(2, min(10, round(20_000 / max(work, 1))))


def _write(look: Look, machine: Machine, arch: str, shape: Shape, weights: str | None, file: str) -> str:
    """Fill in the template; lines that say nothing here are left out."""
    file = shlex.quote(file)
    has_published = arch.startswith(("torchvision:", "timm:"))
    from_published = f"{arch.partition(':')[0]}:DEFAULT are published ones; " if has_published else ""
    training = f"epochs: {choose_epochs(look, shape, machine)}, {choose_optimizer(arch)}"
    is_own = look.root is not None
    counted = (f"{name} ({count})" for name, count in zip(printable_names(look.classes), look.counts))
    text = TEMPLATE.format(
        title=flatten(f"{arch} on {look.root or look.name}, to half of its MACs"),
        images=_describe(look),
        classes=flatten(listing(counted, 8)) or LEFT_OUT,
        file=file,
        published=f"dpm prune {arch} --recipe {file} -o out   from published weights" if has_published else LEFT_OUT,
        editors=editors_line(),
        arch=json.dumps(arch),
        weights=json.dumps(weights),
        weights_comment=f"{from_published}used where no MODEL is given",
        number=len(look.classes),
        input=list(shape),
        name=look.name,
        root=json.dumps(look.root, ensure_ascii=False) if is_own else LEFT_OUT,
        batch=choose_batch(look, shape, machine),
        augment=choose_augment(look, shape),
        workers=min(4, machine.cores) if is_own else LEFT_OUT,
        training=training,
    )
    return "\n".join(line for line in text.splitlines() if LEFT_OUT not in line) + "\n"


def _describe(look: Look) -> str:
    colour = "grey" if look.channels == 1 else "colour"
    size = f"{colour}, {look.width}×{look.height}"
    if look.root is None:
        return f"{look.images} to train on, {len(look.classes)} classes, {size}"
    return f"{sum(look.counts)} in {len(look.classes)} classes, {look.images} to train on; {size} (median)"

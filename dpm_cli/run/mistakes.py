"""Find test images that the slim model gets wrong and the dense one right, for people to look at."""

import base64
import io
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn

from dpm_cli.data import Splits
from dpm_cli.data.splits import sample
from dpm_cli.events import Mistaken
from dpm_cli.tasks.classification import main_output

MOST = 12
IMAGES = 1000  # looked at, at most
SIDE = 96  # pixels; larger pictures are scaled down
LOSSLESS = 48  # pixels; larger ones may lose a little


def find_mistakes(dense: nn.Module, slim: nn.Module, splits: Splits, *, batch: int) -> Iterator[Mistaken]:
    """Yield a few of all classes. Call after the test accuracy.

    dense, slim: in eval mode on the device of the images.
    """
    if not splits.labelled or splits.shape[0] not in (1, 3):
        return
    found = seen = 0
    drawn = sample(len(splits.test), IMAGES, seed=0)
    for images, labels in splits.test.select(drawn).batches(batch, seed=0, epoch=0, augment=None):
        with torch.inference_mode():
            logits = [main_output(model(images), images=len(images)).float() for model in (dense, slim)]
        right, wrong = (each.softmax(1) for each in logits)  # (B, classes)
        said, instead = right.argmax(1), wrong.argmax(1)
        for index in ((said == labels) & (instead != labels)).nonzero()[:, 0].tolist():
            yield Mistaken(
                image=int(drawn[seen + index]),
                label=_name(splits, int(labels[index])),
                slim=_name(splits, int(instead[index])),
                dense_confidence=round(float(right[index].max()), 4),
                slim_confidence=round(float(wrong[index].max()), 4),
                picture=draw(images[index], splits),
            )
            found += 1
            if found == MOST:
                return
        seen += len(labels)


def draw(image: Tensor, splits: Splits) -> str:
    """Turn an input (C, H, W) back into a picture, as a data URL."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (splits.mean, splits.std))
    pixels = ((image.cpu().float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    picture = Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy())
    kind = "PNG" if max(picture.size) <= LOSSLESS else "JPEG"
    picture.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    picture.save(content, kind, **({} if kind == "PNG" else {"quality": 90}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def _name(splits: Splits, label: int) -> str:
    return splits.names[label] if label < len(splits.names) else str(label)

"""Prune a model in a plain PyTorch loop: python examples/plain_loop.py

Trains a small net on the handwritten digits that come with dpm, shrinks it to half of its multiply-accumulates while it
trains on, saves it, and exports it.
"""

from collections.abc import Iterable
from itertools import chain
from tempfile import mkdtemp

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpm_cli
from dpm_cli.data.digits import read_digits
from dpm_cli.models import build

Batches = Iterable[tuple[Tensor, Tensor]]
EPOCHS = 5, 15  # dense, and while it shrinks


def train(model: nn.Module, batches: Batches, lr: float = 0.05) -> None:
    """A loop without pruning."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    model.train()
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def prune(
    model: nn.Module, batches: Batches, *, epochs: int, per_epoch: int, base: str = "depgraph", decay_steps: int = 8
) -> None:
    """The same loop, in which the model shrinks: four more lines."""
    pruner = dpm_cli.Pruner(
        model,
        torch.zeros(2, 1, 8, 8),
        target={"macs": 0.5},
        steps=epochs * per_epoch,
        base=base,
        decay={"steps": decay_steps},
        remove_every=per_epoch,
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    model.train()
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
        pruner.before_step()
        optimizer.step()
        optimizer.zero_grad()
        pruner.after_step(optimizer)
    pruner.finish()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent."""
    model.eval()
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train, prune, save, export."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the net is so small that threads would wait for each other
    (images, labels), (test_images, test_labels) = ((part.pixels / 255, part.labels) for part in read_digits())
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True)
    model = build("digits", classes=10, shape=(1, 8, 8))

    train(model, chain.from_iterable(loader for _ in range(EPOCHS[0])))
    before = accuracy(model, test_images, test_labels)
    prune(
        model,
        chain.from_iterable(loader for _ in range(EPOCHS[1])),
        epochs=EPOCHS[1],
        per_epoch=len(loader),
    )
    after = accuracy(model, test_images, test_labels)

    folder = mkdtemp(prefix="dpm-example-")
    dpm_cli.save(model, f"{folder}/slim.pt", arch="digits")
    (exported,) = dpm_cli.export_slim(f"{folder}/slim.pt", formats=["onnx"], output=folder)
    print(f"{before:.1f} % before, {after:.1f} % with half of the multiply-accumulates; {exported.path}")


if __name__ == "__main__":
    main()

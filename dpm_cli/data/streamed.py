"""Stream a split that does not fit in memory: decode in worker processes, augment on the device."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dpm_cli.data.augment import NO_CHANGE, Draws, draw_epoch, finish
from dpm_cli.data.corrupt import Corrupt
from dpm_cli.data.decode import decode_batches
from dpm_cli.data.splits import Batch, Share, split_order
from dpm_cli.errors import DataError
from dpm_cli.layers.images import Framing
from dpm_cli.recipe.sections import Augment


@dataclass(frozen=True)
class Streamed:
    """One split on disk. It yields what `Images` would, but cuts resized crops from the files' full size."""

    paths: tuple[str, ...]  # N image files
    labels: Tensor  # (N,) int64, on the device that gets the batches
    framing: Framing
    mean: Tensor  # (C,) of pixels in [0, 1], on the device
    std: Tensor  # (C,)
    workers: int  # decoding processes; 0 decodes in this one
    corrupt: Corrupt = field(default_factory=Corrupt)
    share: Share = (0, 1)

    def __len__(self) -> int:
        return len(self.paths)

    def batches(
        self,
        batch: int,
        *,
        seed: int,
        epoch: int,
        augment: Augment | None,
        start: int = 0,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """See `Split.batches`. Images that cannot be read are left out of their batch.

        Raises DataError while iterating, naming the image that exceeds the limit.
        """
        _, height, width = self.framing.shape
        order, draws = torch.arange(len(self)), Draws(None, None, None, None)
        if augment is not None:
            order, draws = draw_epoch(len(self), augment, height=height, width=width, seed=seed, epoch=epoch)
        parts = split_order(order, batch, start=start, drop_last=drop_last, share=self.share)
        return self._decode(parts, draws, augment or NO_CHANGE)

    def _decode(self, parts: list[Tensor], draws: Draws, augment: Augment) -> Iterator[Batch]:
        device = self.labels.device
        indexes = [part.tolist() for part in parts]
        arrays = decode_batches(
            self.paths, self.framing, indexes, workers=self.workers, corrupt=self.corrupt, boxes=draws.box
        )
        draws = replace(draws, box=None).to(device)  # the workers have done the boxes
        for array, kept in arrays:
            if not kept:
                raise DataError(f"no image of a whole batch can be read; {self.corrupt.note}")
            part, pixels = torch.tensor(kept, device=device), torch.from_numpy(array).to(device)
            yield finish(pixels, draws.of(part), augment, mean=self.mean, std=self.std), self.labels[part]

    def select(self, index: Tensor) -> "Streamed":
        """Select the files of `index` (M,), a CPU tensor, in that order."""
        paths = tuple(self.paths[i] for i in index.tolist())
        return replace(self, paths=paths, labels=self.labels[index.to(self.labels.device)])

    def of_rank(self, rank: int, size: int) -> "Streamed":
        return replace(self, share=(rank, size))

    def to(self, device: torch.device) -> "Streamed":
        return replace(self, labels=self.labels.to(device), mean=self.mean.to(device), std=self.std.to(device))

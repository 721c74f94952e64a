"""Train one model in several processes, started by a launcher such as `torchrun`.

Every process holds the whole model and takes its slice of each batch. Gradients are averaged by DistributedDataParallel
and weighted by images, BatchNorm normalises by the whole batch (`whole_batch.py`), and augmentation is drawn for the
whole batch. Every process therefore takes the step that a single process would take, but for rounding, and all decide
the same. Only the main process reads and writes files and talks to the user.

A process that fails records this in the launcher's key-value store, which outlives it. The others find it there and
exit silently with the same exit code.
"""

import contextlib
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from dpm_cli.engine.digest import digest
from dpm_cli.engine.whole_batch import normalising_together
from dpm_cli.errors import DpmError, RunError, ToldElsewhere, UsageError, flatten

T = TypeVar("T")
S = TypeVar("S", bound="Sliced")
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables that every launcher sets
PATIENCE = timedelta(minutes=30)  # time limit for the slowest process at any step
GRACE = 5.0  # seconds for the main process to tidy up: launchers end all when the first exits


class Sliced(Protocol):
    """Yields images in batches; see `data.splits.Split`."""

    def of_rank(self: S, rank: int, size: int) -> S: ...


class World:
    """Single process: every collective is a no-op."""

    rank, size = 0, 1

    @property
    def is_main(self) -> bool:
        """Tell whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Sum each number over all processes."""
        return list(numbers)

    def largest(self, number: int) -> int:
        """Return the largest number of all processes."""
        return number

    def gather(self, value: T) -> list[T]:
        """Collect the values of all processes, in order of rank."""
        return [value]

    def share(self, value: T) -> T:
        """Return the main process's value. The others wait for it without a time limit."""
        return value

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process run the block first; the others then find its files on the disk."""
        yield

    def require_same(self, what: str, value: object) -> None:
        """Raise RunError on all processes if their values differ. value: as for `digest`."""

    def slice(self, split: S) -> S:
        """Reduce every batch of a split to this process's slice. Its length stays that of the whole."""
        return split

    def wrap(self, model: nn.Module) -> Callable[[Tensor], object]:
        """Wrap a model so that backward averages gradients over the processes. Wrap it again after compaction."""
        return model

    def normalising(self) -> contextlib.AbstractContextManager[object]:
        """Let BatchNorm use all images of a batch, for forward passes in train mode."""
        return contextlib.nullcontext()

    def weigh(self, loss: Tensor, images: int, of: float) -> Tensor:
        """Scale a mean loss over a slice, so that the average over processes is the mean over the batch."""
        return loss

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor over the processes, on the device."""
        return value

    def roll(self, batch: Tensor) -> Tensor:
        """Return (B, ...) the predecessor of each entry in the whole batch; the first one gets the last."""
        return batch.roll(1, 0)

    def seed(self, *key: int) -> None:
        """Seed dropout from (key, rank): masks differ within a batch, and a resumed run draws the same."""

    def share_buffers_(self, model: nn.Module) -> None:
        """Copy the main process's buffers to all, as training may have changed them from one slice only."""


ALONE = World()


class Together(World):
    """Is one of several processes. All must call the same methods in the same order."""

    def __init__(self, rank: int, size: int, store: Store, device: torch.device) -> None:
        self.rank, self.size, self._store, self._device = rank, size, store, device
        self._shared = itertools.count()
        self._left = threading.Event()
        self._failed: str | None = None  # what `watch` read about another process

    def sum(self, *numbers: float) -> list[float]:
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(number) for number in total.tolist()]

    def largest(self, number: int) -> int:
        value = torch.tensor(int(number))  # a bool must be sent as an int
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: T) -> T:
        key = f"shared {next(self._shared)}"
        if self.is_main:
            self._store.set(key, "")
        else:
            self._wait_for(key)  # may take hours, longer than the time limit of collectives
        values: list[Any] = [value]
        dist.broadcast_object_list(values)
        return values[0]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        if not self.is_main:
            self.share(None)
        yield
        if self.is_main:
            self.share(None)

    def require_same(self, what: str, value: object) -> None:
        digests = self.gather(digest(value))
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            names = ", ".join(map(str, others))
            raise RunError(
                f"the processes disagree on {what} (rank {names} and rank 0): give all of them the same files and "
                "versions, and --resume from the last checkpoint"
            )

    def slice(self, split: S) -> S:
        return split.of_rank(self.rank, self.size)

    def wrap(self, model: nn.Module) -> Callable[[Tensor], object]:
        devices = [self._device] if self._device.type == "cuda" else None
        # Layers that are not used in a step must get no gradient, as in a single process.
        return DistributedDataParallel(model, devices, broadcast_buffers=False, find_unused_parameters=True)

    def normalising(self) -> contextlib.AbstractContextManager[object]:
        return normalising_together()

    def weigh(self, loss: Tensor, images: int, of: float) -> Tensor:
        return loss * (images * self.size / of)

    def mean(self, value: Tensor) -> Tensor:
        total = value / self.size
        dist.all_reduce(total)
        return total

    def roll(self, batch: Tensor) -> Tensor:
        last = batch.new_zeros(self.size, *batch.shape[1:])  # a row per process; the sum gathers them
        last[self.rank] = batch[-1]
        dist.all_reduce(last)
        return torch.cat([last[self.rank - 1, None], batch[:-1]])

    def seed(self, *key: int) -> None:
        torch.manual_seed(int.from_bytes(hashlib.blake2b(repr((*key, self.rank)).encode(), digest_size=8).digest()))

    def share_buffers_(self, model: nn.Module) -> None:
        buffers = [buffer for buffer in model.buffers() if buffer.numel()]
        if buffers:
            parts = [buffer.detach().contiguous().view(-1).view(torch.uint8) for buffer in buffers]
            everything = torch.cat(parts)
            dist.broadcast(everything, 0)
            for buffer, part in zip(buffers, torch.split(everything, [len(part) for part in parts])):
                buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))

    # ------------------------------------------------------------------------------------------ when one of them fails

    def leave(self) -> None:
        """Leave at the end of the run: the others leave after the main process."""
        if self.is_main:
            self._store.set("left", "")
        else:
            self._wait_for("left")
        self.sum(0)  # a number, or nobody waits; the store may end with the main process
        self._left.set()

    def fail(self, exit_code: int) -> int | None:
        """Report that this process failed. Returns the exit code of another one that reported first, else None."""
        self._left.set()
        try:
            mine = f"{self.rank} {exit_code}"
            first = self._store.compare_set("failed", "", mine).decode()
            if self.is_main:
                self._store.set("left", "")
                time.sleep(2)  # the store may vanish with this process, so let the others read it
            else:
                waited = time.monotonic()
                while not self._store.check(["left"]) and time.monotonic() < waited + GRACE:
                    time.sleep(0.1)
                time.sleep(1)  # time for the main process's last line
            return None if first == mine else int(first.split()[1])
        except dist.DistError:  # the store vanished with the launcher or the main process
            return int(self._failed.split()[1]) if self._failed else None

    def watch(self, store: Store) -> None:
        """End this process if it waits in vain for another that failed. Run in a thread with its own store."""
        while not self._left.wait(1):
            is_lost = False
            try:
                if store.check(["failed"]):
                    self._failed = store.get("failed").decode()
            except dist.DistError:
                is_lost = True
            if (self._failed or is_lost) and not self._left.wait(2 * GRACE):
                os._exit(int(self._failed.split()[1]) if self._failed else 1)

    def _wait_for(self, key: str) -> None:
        while not self._store.check([key]):
            if self._store.check(["failed"]):
                raise RunError("another process failed")
            time.sleep(0.05)


_joined: World | None = None


def is_launched() -> bool:
    return all(name in os.environ for name in LAUNCHER)


@contextlib.contextmanager
def join(device: str = "auto") -> Iterator[World]:
    """Join the processes that the environment describes, or run alone without a launcher. Nested calls share one world.

    An error ends all processes: the first to fail raises it, the others raise ToldElsewhere.
    """
    global _joined
    if _joined or not is_launched():
        yield _joined or ALONE
        return
    _joined = world = _connect(device)
    try:
        yield world
        world.leave()
        dist.destroy_process_group()
    except BaseException as error:
        code = world.fail(_exit_code(error))
        if code is not None:
            raise ToldElsewhere(code) from None
        if _is_lost_connection(error):
            raise RunError(
                "another process of this run was lost; --resume goes on from the last checkpoint, also with another "
                "number of processes"
            ) from error
        raise
    finally:
        _joined = None


def _connect(device: str) -> Together:
    if dist.is_initialized():
        raise UsageError("torch.distributed is initialised already: let dpm do it, or start it without a launcher")
    chosen = _take_device(device)
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE / 3))
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        group = PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise RunError(
            f"the processes of this run cannot find each other ({flatten(error)}): check the launcher"
        ) from None
    world = Together(rank, size, PrefixStore("dpm", store), chosen)
    threading.Thread(target=world.watch, args=[PrefixStore("dpm", store.clone())], daemon=True).start()
    return world


def _take_device(device: str) -> torch.device:
    """Give each process of a machine its own GPU, and make it torch's current device. Raises UsageError."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or not count:
        return torch.device("cpu")  # `choose_device` refuses a device that is absent
    if device not in ("auto", "cuda"):
        raise UsageError(f"device is {device!r}, but each process takes a GPU of its own: use auto, cuda or cpu")
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if place >= count:
        raise UsageError(f"process {place} of a machine with {count} GPUs: start fewer, or use --device cpu")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def _exit_code(error: BaseException) -> int:
    return error.exit_code if isinstance(error, DpmError) else getattr(error, "exit_code", 1)


def _is_lost_connection(error: BaseException) -> bool:
    said = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in said for word in ("gloo", "Gloo", "NCCL", "Connection closed"))
    )

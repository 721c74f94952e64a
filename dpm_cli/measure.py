"""Measure what a network costs: MACs, parameters, bytes, and milliseconds on this machine."""

import copy
import importlib.metadata
import io
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, assert_never, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dpm_cli.errors import UsageError
from dpm_cli.layers.modes import in_mode, plain_attention

Counter = Literal["flop_counter", "thop"]
Run = Callable[[Tensor], object]
Taken = tuple[float, float]  # milliseconds of a call: by the clock, and of the processor

SPREAD = 1.5  # upper quartile / lower quartile: beyond, a latency is doubted
WAITED = 0.15  # fraction of the time that a single thread may spend waiting for a core
ATTEMPTS = 3
REST = 0.5  # seconds between attempts


def read_clocks() -> tuple[float, float]:
    """Return seconds by the clock, and of this process's processor time."""
    return time.perf_counter(), time.process_time()


@runtime_checkable
class Clocked(Protocol):
    """A run that computes elsewhere, and knows how many seconds it has computed: by the clock, and of the processor."""

    def read_clocks(self) -> tuple[float, float]: ...


def clocks_of(run: Run) -> Callable[[], tuple[float, float]]:
    """Return what reads the clocks of the process that a run computes in."""
    return run.read_clocks if isinstance(run, Clocked) else read_clocks


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median and quartiles of `runs` warm calls."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    threads: int  # of torch, and so of what this package runs
    processor_ms: float  # processor time of a call, of all its threads, without waiting: the lower quartile, because
    # each interruption empties the caches, which costs a small model a larger share
    doubt: str | None = None  # why the figure may be wrong, in one clause


def count_macs(module: nn.Module, example: Tensor, counter: Counter = "flop_counter") -> int:
    """Count the multiply-accumulates of one image in eval mode; only the first of `example` (B, C, H, W) is used.

    `flop_counter` counts convolutions, matrix products and attention, and nothing else. `thop` counts what papers that
    used it report: norms too, but no attention; choose it to compare with those.
    Raises UsageError where thop cannot be imported.

        count_macs(nn.Conv2d(3, 5, 3, padding=1), torch.randn(1, 3, 8, 8))  # 9 · 3 · 5 · 8 · 8 = 8640
    """
    image = example[:1].detach()  # (1, C, H, W); parts that do not depend on the batch are counted once, as they should
    match counter:
        case "flop_counter":
            with (
                in_mode(module, training=False),
                _frozen(module),  # the counter's hooks stumble over parameters that are handed from module to module
            ):
                return count_macs_of_call(module, image)
        case "thop":
            return _count_with_thop(module, image)
        case _:
            assert_never(counter)


def count_macs_of_call(run: Run, images: Tensor) -> int:
    """Count the multiply-accumulates of one call, as `flop_counter` does; all of torch that `run` calls counts."""
    flops = FlopCounterMode(display=False)
    # Inference mode hides the matrix products inside aten.linear from the counter, the fast path all attention.
    with torch.inference_mode(False), torch.no_grad(), plain_attention(), flops:
        run(images)
    return int(flops.get_total_flops()) // 2


def count_parameters(module: nn.Module) -> int:
    """Count the scalars of all parameters: a shared one counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_bytes(module: nn.Module) -> int:
    """Measure the saved state dict, so that dense and slim are compared without whatever else their files hold."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell()


def measure_latency(run: Run, example: Tensor, *, seconds: float = 1.0, least: int = 10) -> Latency:
    """Call `run(example)` warm for some seconds, at least `least` times. A module is measured in eval mode.

    measure_latency(model, torch.randn(1, 3, 224, 224)).median_ms
    """
    return measure_in_turns({"run": run}, example, seconds=seconds, least=least, turns=1)["run"]


def measure_in_turns(
    runs: Mapping[str, Run], example: Tensor, *, seconds: float = 1.0, least: int = 10, turns: int = 5
) -> dict[str, Latency]:
    """Measure several contenders for `seconds` each, in turns, so that a busy moment of the machine hits them all.

    A measurement that a busy machine has spoilt is repeated, up to twice; if it stays doubtful, the calmest attempt is
    returned, and says so. Meanwhile denormal numbers are flushed to zero: pruned networks can produce them, and CPUs
    are slow with them.
    """
    with ExitStack() as stack:
        for run in runs.values():
            if isinstance(run, nn.Module):
                stack.enter_context(in_mode(run, training=False))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(flushing_denormals())
        for run in runs.values():
            _time(run, example, seconds=seconds / 5, least=3)
        calmest: dict[str, Latency] = {}
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(min(REST, seconds))
            measured = _take_turns(runs, example, seconds=seconds, least=least, turns=turns)
            if not calmest or _restlessness(measured) < _restlessness(calmest):
                calmest = measured
            if not any(latency.doubt for latency in measured.values()):
                break
        return calmest


def _take_turns(
    runs: Mapping[str, Run], example: Tensor, *, seconds: float, least: int, turns: int
) -> dict[str, Latency]:
    """Measure all contenders once."""
    times: dict[str, list[Taken]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            if len(runs) > 1:
                run(example)  # the others have emptied the caches
            times[name] += _time(run, example, seconds=seconds / turns, least=math.ceil(least / turns))
    latencies = {}
    for name, run in runs.items():
        latency, (took, busy) = _summarise(times[name]), map(sum, zip(*times[name]))
        alone = _time_alone(run, example, seconds=seconds / 5) if latency.threads > 1 else None
        latencies[name] = replace(latency, doubt=_find_doubt(latency, busy / took, alone, on_cpu=not example.is_cuda))
    return latencies


def _find_doubt(latency: Latency, share: float, alone: float | None, *, on_cpu: bool) -> str | None:
    """Say why a figure may be wrong. share: processor time / time. alone: milliseconds with one thread of torch."""
    reasons = []
    if alone is not None and alone * 2 < latency.median_ms:
        reasons.append(f"one thread takes {alone:.3g} ms, {latency.threads} mostly wait for each other")
    if latency.high_ms > SPREAD * latency.low_ms:
        reasons.append(f"the quartiles are {latency.low_ms:.3g} and {latency.high_ms:.3g} ms")
    load, cores = _load(), os.cpu_count() or 1
    if on_cpu and latency.threads == 1 and share < 1 - WAITED:
        reasons.append(f"it waited for a core for {100 * (1 - share):.0f} % of the time")
    elif on_cpu and latency.threads > 1 and load > cores + latency.threads:
        reasons.append("other programs had the cores")
    if not reasons:
        return None
    return f"{'; '.join(reasons)} (load {load:.1f} on {cores} cores)"


def _restlessness(measured: Mapping[str, Latency]) -> tuple[int, float]:
    """Order attempts: fewer doubts first, then the smaller spread."""
    spreads = [latency.high_ms / latency.low_ms for latency in measured.values() if latency.low_ms > 0]
    return sum(latency.doubt is not None for latency in measured.values()), max(spreads, default=0.0)


def _time_alone(run: Run, example: Tensor, *, seconds: float) -> float:
    """Return the median milliseconds of a call with one thread of torch; ONNX Runtime keeps its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return statistics.median(took for took, _ in _time(run, example, seconds=seconds, least=3))
    finally:
        torch.set_num_threads(threads)


def _load() -> float:
    """Return the average number of busy programs during the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def hardware() -> dict[str, str | int | None]:
    """Describe the machine and the versions that a measurement belongs to."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "dpm": _version("dpm-cli"),
    }


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Temporarily freeze all parameters."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Temporarily flush denormal numbers to zero, if the CPU can do that."""
    with keeping_denormals():
        torch.set_flush_denormal(True)
        yield


@contextmanager
def keeping_denormals() -> Iterator[None]:
    """Restore this thread's treatment of denormal numbers afterwards; torch can set it but not read it."""
    flushes = sys.float_info.min / 2 == 0.0  # Python's own arithmetic obeys the same switch of the CPU
    try:
        yield
    finally:
        torch.set_flush_denormal(flushes)


def _time(run: Run, example: Tensor, *, seconds: float, least: int) -> list[Taken]:
    """Time calls until both limits are reached."""
    on_gpu = example.device.type == "cuda"
    read = clocks_of(run)
    times: list[Taken] = []
    if on_gpu:
        torch.cuda.synchronize(example.device)
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        before = read()
        run(example)
        if on_gpu:
            torch.cuda.synchronize(example.device)
        took, busy = (1e3 * (now - then) for now, then in zip(read(), before))
        times.append((took, busy))
    return times


def _summarise(times: list[Taken]) -> Latency:
    low, median, high = statistics.quantiles((took for took, _ in times), n=4, method="inclusive")
    return Latency(
        median_ms=median,
        low_ms=low,
        high_ms=high,
        runs=len(times),
        threads=torch.get_num_threads(),
        processor_ms=statistics.quantiles((busy for _, busy in times), n=4, method="inclusive")[0],
    )


def _count_with_thop(module: nn.Module, image: Tensor) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it imports distutils
            import thop
    except ImportError as error:
        raise UsageError(
            f"counter is 'thop', which cannot be imported ({error}); install setuptools, or use counter: flop_counter"
        ) from None
    with torch.inference_mode(False), torch.no_grad(), plain_attention():
        macs, _ = thop.profile(copy.deepcopy(module), inputs=(image,), verbose=False)  # it leaves buffers behind
    return int(macs)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

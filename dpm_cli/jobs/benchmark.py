"""`dpm benchmark`: the latency of many files, in several runtimes, batch sizes and numbers of threads, in turns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dpm_cli.errors import UsageError
from dpm_cli.export import RUNS, choose_runtime, open_exported, require_runtime
from dpm_cli.files import size_of
from dpm_cli.jobs.loading import AnyRecipe, open_deployed, resolve_recipe
from dpm_cli.layers.images import Shape
from dpm_cli.measure import Latency, Run, clocks_of, measure_in_turns
from dpm_cli.models import load_model
from dpm_cli.models.read import read_model_file
from dpm_cli.models.slim import rebuild
from dpm_cli.models.slim_content import is_slim, parse_content
from dpm_cli.recipe import is_own_code
from dpm_cli.results import Benchmarked

MOST = 10_000  # images of a batch, or threads


def benchmark(
    files: Sequence[str | Path],
    *,
    runtimes: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    seconds: float = 1.0,
    turns: int = 5,
    recipe: AnyRecipe | None = None,
    arch: str | None = None,
    trust: bool = False,
) -> list[Benchmarked]:
    """Measure the latency of files on the CPU, all in turns, so that a busy moment of the machine hits them all.

        dpm_cli.benchmark(["out/model.onnx", "out/model.int8.onnx"], batches=[1, 8], threads=[1])

    files: exported files, slim.pt, and with `recipe` dense weights. runtimes: the usual one of each file by default;
    files that one of them cannot run are left out there. threads: as many as torch has by default. seconds: of each
    measurement. arch: builds each slim.pt of your own code, as for `load`. The first file is what the others are
    compared with: of one thread by processor time, which other programs do not slow down, of several by the clock.
    """
    _require_sensible(files, batches, threads, seconds, turns)
    runtimes = [require_runtime(each) for each in runtimes]
    subjects = [_look_at(Path(file), recipe, arch, trust) for file in files]
    contenders: dict[str, Run] = {}
    rows: dict[str, Benchmarked] = {}
    for count in threads or [torch.get_num_threads()]:
        for subject in subjects:
            chosen = [each for each in runtimes if each in RUNS[subject.format]] or (
                [choose_runtime(subject.format, runtimes[0] if runtimes else None, subject.path)]
            )
            for runtime in chosen:
                run = subject.open(runtime, count, trust)
                for batch in batches:
                    name = f"{len(rows)}"
                    contenders[name] = _Contender(run, subject.images(batch), count)
                    rows[name] = Benchmarked(str(subject.path), subject.format, subject.bytes, runtime, batch, count)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # each contender sets its own number
        measured = measure_in_turns(contenders, torch.zeros(1), seconds=seconds, turns=turns)
    finally:
        torch.set_num_threads(before)
    return _compare([_fill(row, measured[name]) for name, row in rows.items()])


@dataclass(frozen=True)
class _Subject:
    """A file to measure."""

    path: Path
    format: str  # of RUNS
    shape: Shape
    bytes: int
    module: torch.nn.Module | None  # None for an exported file

    def images(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0))  # (B, C, H, W)

    def open(self, runtime: str, threads: int, trust: bool) -> Run:
        return self.module or open_exported(self.path, trust=trust, runtime=runtime, threads=threads, confined=True)


def _look_at(path: Path, recipe: AnyRecipe | None, arch: str | None, trust: bool) -> _Subject:
    """Find out what a file is and what it takes. Raises ModelFileError or UsageError."""
    exported = open_deployed(path, trust)
    size = size_of(path)
    if exported is not None:
        shape = exported.shape or (resolve_recipe(recipe, trust=trust).model.input if recipe is not None else None)
        if shape is None:
            raise UsageError(f"{path} does not say how large its images are: give --recipe")
        return _Subject(path, exported.format, shape, size, None)
    if is_slim(content := read_model_file(path, trust=trust)):
        parsed = parse_content(content, path)
        needs_arch = parsed.arch is None or is_own_code(parsed.arch)
        slim = rebuild(parsed, path, arch if needs_arch else None, trust=trust)
        return _Subject(path, "weights", slim.shape, size, slim.module.eval())
    if recipe is None:
        raise UsageError(f"{path} holds weights of a model that only a recipe describes: give --recipe")
    spec = resolve_recipe(recipe, trust=trust).model
    loaded = load_model(path, arch=spec.arch, classes=spec.classes, shape=spec.input, trust=trust)
    return _Subject(path, "weights", spec.input, size, loaded.module.eval())


@dataclass(frozen=True)
class _Contender:
    """Runs on images of its own. Torch computes with so many threads, others were opened with theirs."""

    run: Run
    images: Tensor
    threads: int

    def __call__(self, _: Tensor) -> object:
        torch.set_num_threads(self.threads)
        try:
            return self.run(self.images)
        finally:
            torch.set_num_threads(1)

    def read_clocks(self) -> tuple[float, float]:
        return clocks_of(self.run)()


def _fill(row: Benchmarked, latency: Latency) -> Benchmarked:
    return replace(
        row,
        median=latency.median_ms,
        low=latency.low_ms,
        high=latency.high_ms,
        processor=latency.processor_ms,
        images_per_second=1000 * row.batch / latency.median_ms,
        doubt=latency.doubt,
    )


def _compare(rows: Sequence[Benchmarked]) -> list[Benchmarked]:
    """Compare each row with the first file's first row of the same batch and threads.

    Of one thread, the processor time says what a quiet machine would take; of several, it leaves out waiting.
    """

    def taken(row: Benchmarked) -> float:
        return row.processor if row.threads == 1 else row.median

    firsts: dict[tuple[int, int], float] = {}
    for row in rows:
        firsts.setdefault((row.batch, row.threads), taken(row))
    return [replace(row, faster=firsts[row.batch, row.threads] / taken(row)) for row in rows]


def _require_sensible(
    files: Sequence[str | Path], batches: Sequence[int], threads: Sequence[int], seconds: float, turns: int
) -> None:
    if not files:
        raise UsageError("no file was given: name at least one")
    for name, values in (("batch", batches), ("threads", threads)):
        for value in values:
            if not 1 <= value <= MOST:
                raise UsageError(f"{name} is {value}; it lies between 1 and {MOST}")
    if not 0 < seconds <= 3600 or turns < 1:
        raise UsageError(f"seconds is {seconds:g} in {turns} turns; both must be above 0, at most an hour")

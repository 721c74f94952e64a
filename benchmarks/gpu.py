"""Run everything that needs a GPU by one command: unattended, in order of worth, each part with a time limit.

python benchmarks/gpu.py --kit .kit --out out --budget 540                all parts, on CUDA, in nine minutes
python benchmarks/gpu.py --kit .kit --out out --parts step profile        some of them
python benchmarks/gpu.py --kit .kit --out out --more out/kept.tar.gz      goes on with the runs of an earlier call
python benchmarks/gpu.py --rehearse --out out                             all parts in miniature, on the CPU

`gpu_parts.py` says what the parts are, `gpu_kit.py` makes the kit. Every job of a part is a process of its own, killed
with its descendants at the limit. After every part three files are written: `summary.json` (exit codes, seconds, the
rows of every benchmark), `logs.txt`, and `kept.tar.gz` (results, reports and dense nets).
"""

import argparse
import json
import os
import resource
import runpy
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

# Children are forked, so what is imported here is imported once. Nothing here may ask for a GPU: CUDA survives no fork.
import torch  # noqa: E402
import torchvision  # noqa: E402, F401
from gpu_parts import PARTS, Job, Part, Place  # noqa: E402

import dpm_cli.jobs.prune  # noqa: E402
import dpm_cli.jobs.train  # noqa: E402, F401

GRACE = 2.0  # seconds between SIGTERM and SIGKILL
SPARE = 8.0  # seconds of the budget for writing and packing
TAIL = 15  # lines of a log in the summary
LARGEST, MOST = 6 << 20, 15 << 20  # bytes of a kept file, and of all of them


def run_job(job: Job, place: Place, log: Path) -> None:
    """Become the job, in a forked child."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(place.work)
    os.environ |= place.environment() | dict(job.environment)
    script, arguments = HERE / job.program, [str(argument) for argument in job.arguments]
    print(f"$ {job.program} {' '.join(arguments)}", flush=True)
    if getattr(torch._C, "_cuda_isInBadFork", bool)():
        os.execv(sys.executable, [sys.executable, *([script] if script.exists() else ["-m", job.program]), *arguments])
    sys.argv = [str(script), *arguments]
    if script.exists():
        runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_module(job.program, run_name="__main__", alter_sys=True)


def descendants(of: int) -> Iterator[int]:
    """Yield a process and those that it and they have started, on Linux."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = [of]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
        yield process


def processor_seconds() -> float:
    """Return the CPU time of all jobs that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def end(process: BaseProcess) -> None:
    """Ask a job and all its descendants to end, then kill them."""
    assert process.pid
    family = list(descendants(process.pid))
    for signal_number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        for member in family:
            with suppress(ProcessLookupError):
                os.kill(member, signal_number)
        process.join(patience)


class Runner:
    """Runs parts until the budget is spent, and keeps what was done on the disk."""

    def __init__(self, out: Path, place: Place, budget: float) -> None:
        self.out, self.place, self.deadline = out, place, time.monotonic() + budget
        self.done: list[dict[str, Any]] = []
        self._fork, self._started = get_context("fork"), time.monotonic()

    @property
    def left(self) -> float:
        return self.deadline - SPARE - time.monotonic()

    def run(self, parts: Sequence[Part]) -> None:
        for number, part in enumerate(parts):
            later = sum(each.reserved for each in parts[number + 1 :])
            limit = self.left if self.place.rehearses else min(part.seconds, self.left - later)
            if limit < min(part.least, part.seconds):
                self.done.append({"part": part.name, "skipped": f"{limit:.0f} s were left for it"})
            else:
                self.done.append(self._run_part(part, limit))
            self.write()
            print(show(self.done[-1]), flush=True)

    def _run_part(self, part: Part, limit: float) -> dict[str, Any]:
        started, worked = time.monotonic(), processor_seconds()
        jobs = part.jobs(self.place, limit)
        logs = {
            job: self.place.logs / f"{len(self.done):02}-{part.name}-{i}-{job.name}.log" for i, job in enumerate(jobs)
        }
        processes = {job: self._fork.Process(target=run_job, args=(job, self.place, logs[job])) for job in jobs}
        rows: dict[Job, dict[str, Any]] = {}
        try:
            for process in processes.values():
                process.start()
            while len(rows) < len(jobs):
                for job, process in processes.items():
                    spent = time.monotonic() - started
                    is_late = job not in rows and process.is_alive() and spent > limit
                    if is_late:
                        end(process)
                    if job not in rows and not process.is_alive():
                        rows[job] = {"job": job.name, "seconds": round(spent, 1)} | (
                            {"killed": True} if is_late else {"exit_code": process.exitcode}
                        )
                time.sleep(0.02)
        finally:
            for process in processes.values():
                if process.is_alive():
                    end(process)
        for job in jobs:
            rows[job]["tail"] = logs[job].read_text(errors="replace").splitlines()[-TAIL:] if logs[job].exists() else []
        spent = {"seconds": time.monotonic() - started, "CPU seconds": processor_seconds() - worked, "limit": limit}
        return {
            "part": part.name,
            **{name: round(seconds, 1) for name, seconds in spent.items()},
            "jobs": [rows[job] for job in jobs],
        }

    def write(self) -> None:
        """Write what is known by now. Each file appears whole."""
        results = {path.stem: json.loads(path.read_text()) for path in sorted(self.place.results.glob("*.json"))}
        about = {"seconds": round(time.monotonic() - self._started, 1), "torch": torch.__version__}
        summary = json.dumps(about | {"parts": self.done, "results": results}, indent=1) + "\n"
        logs = [
            f"==> {path.name} <==\n{path.read_text(errors='replace')}" for path in sorted(self.place.logs.iterdir())
        ]
        for name, text in (("summary.json", summary), ("logs.txt", "\n".join(logs))):
            (self.out / f"{name}.tmp").write_text(text)
            os.replace(self.out / f"{name}.tmp", self.out / name)
        self._keep(self.out / "kept.tar.gz")

    def _keep(self, archive: Path) -> None:
        """Pack what a later call and RESULTS.md need, the most wanted first, as far as it is small."""
        place = self.place
        patterns = (
            (place.results, "*"),
            (place.runs, "*/*/report.json"),
            (place.runs, "*/*.pt"),
            (place.runs, "*/*/metrics.jsonl"),
        )
        with (
            archive.with_suffix(".tmp").open("wb") as file,
            tarfile.open(fileobj=file, mode="w:gz", compresslevel=3) as packed,
        ):
            for path in (path for folder, pattern in patterns for path in sorted(folder.glob(pattern))):
                if path.is_file() and path.stat().st_size <= LARGEST and file.tell() <= MOST - LARGEST:
                    packed.add(path, path.relative_to(place.work))
        os.replace(archive.with_suffix(".tmp"), archive)


def show(row: Mapping[str, Any]) -> str:
    """Write a part in one line."""
    if "skipped" in row:
        return f"{row['part']}: skipped, {row['skipped']}"
    jobs = [
        f"{job['job']} {'killed' if 'killed' in job else job['exit_code']} ({job['seconds']} s)" for job in row["jobs"]
    ]
    return f"{row['part']}: {row['seconds']} s of {row['limit']} ({row['CPU seconds']} s of CPU): {', '.join(jobs)}"


@contextmanager
def working_in(folder: Path | None) -> Iterator[Path]:
    """Return a folder to work in: this one, or a temporary one."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the three files go")
    parser.add_argument("--kit", type=Path, help="what gpu_kit.py packed; a rehearsal draws images instead")
    parser.add_argument("--work", type=Path, help="where images and runs are kept; default: nowhere")
    parser.add_argument("--budget", type=float, help="seconds for everything; 540, and 1800 for a rehearsal")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--more", type=Path, help="kept.tar.gz of an earlier call, whose runs are not repeated")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    if not given.rehearse and not given.kit:
        parser.error("--kit is missing: without it there are no images")
    given.out.mkdir(parents=True, exist_ok=True)
    with working_in(given.work) as work:
        place = Place(work, given.kit and given.kit.resolve(), given.rehearse)
        place.make()
        if given.more:
            with tarfile.open(given.more) as packed:
                packed.extractall(work, filter="data")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        runner = Runner(given.out.resolve(), place, given.budget or (1800 if given.rehearse else 540))
        runner.run([PARTS[name] for name in PARTS if name in given.parts])
    failed = [row["part"] for row in runner.done if any(job.get("exit_code") for job in row.get("jobs", ()))]
    print(f"failed: {', '.join(failed) or 'nothing'}; all of it is in {given.out / 'summary.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

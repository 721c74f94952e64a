"""Kill `dpm prune` (every base) and `dpm train` at random moments, resume, and compare the final weights bit by bit.

    python benchmarks/kills.py --kills 100 --work /tmp/kills

Each job is killed by SIGKILL after a random time, again and again, until the wanted number of kills is reached; jobs
that finish begin anew. Prints kills and comparisons per job; ends with 1 if any bit differs. The counts are kept in
WORK/kills.json, so the same line goes on where it was stopped.

On CUDA (`--device cuda`) bits are promised only with `--deterministic`; without it, only the widths are compared.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

SMALL = ["--set", "data.limit=300", "--set", "export=[]", "--set", "checkpoint.every=5", "--set", "precision=fp32"]
JOBS = ["train", "depgraph", "otov2", "gate-decorator", "on-the-fly"]


def command(job: str, work: Path, name: str, dense: Path, options: list[str]) -> tuple[list[str], Path]:
    """Return the command of a job, and the file whose weights are compared."""
    start = [sys.executable, "-m", "dpm_cli"]
    if job == "train":
        out = work / f"{name}.pt"
        return [*start, "train", "-r", "digits", "-o", str(out), "--resume", "--quiet", *SMALL, *options], out
    out = work / name
    base = ["--set", f"prune.base={job}"]
    if job == "on-the-fly":
        base += ["--set", "prune.target.sparsity=0.5", "--set", "finetune.epochs=0"]
    if job == "otov2":
        base += ["--set", "prune.rounds=1", "--set", "train.epochs=30"]
    return [
        *start,
        "prune",
        str(dense),
        "-r",
        "digits",
        "-o",
        str(out),
        "--resume",
        "--quiet",
        *base,
        *SMALL,
        *options,
    ], (out / "slim.pt")


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return content.get("state_dict", content) | {
        f"{name}.{part}": tensor for name, parts in content.get("packed", {}).items() for part, tensor in parts.items()
    }


def is_same(left: Path, right: Path, *, bits: bool) -> bool:
    ours, theirs = weights(left), weights(right)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) if bits else ours[name].shape == theirs[name].shape for name in ours
    )


class Tally:
    """Counts what happened to each job so far, in a file that outlives this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.of: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, job: str, what: str) -> None:
        counts = self.of.setdefault(job, {})
        counts[what] = counts.get(what, 0) + 1
        self._path.write_text(json.dumps(self.of, indent=2))

    def get(self, job: str, what: str) -> int:
        return self.of.get(job, {}).get(what, 0)


def run_killed(job: str, kills: int, work: Path, dense: Path, tally: Tally, options: list[str], *, bits: bool) -> bool:
    """Kill a job until it was killed so often. Returns whether all bits were equal, or all shapes."""
    if tally.get(job, "kills") >= kills and tally.get(job, "compared"):
        return True
    line, whole = command(job, work, f"{job}-whole", dense, options)
    started = time.monotonic()
    if not whole.exists():
        subprocess.run(line, check=True, capture_output=True)
        (work / f"{job}-seconds").write_text(str(time.monotonic() - started))
    seconds = float((work / f"{job}-seconds").read_text())
    dice = random.Random(f"{job} {tally.get(job, 'kills')}")
    is_new = True
    while is_new or tally.get(job, "kills") < kills:
        is_new = False
        line, killed = command(job, work, f"{job}-killed", dense, options)
        shutil.rmtree(work / f"{job}-killed", ignore_errors=True)
        for old in work.glob(f"{job}-killed*.pt"):
            old.unlink()
        started, before = time.monotonic(), tally.get(job, "kills")
        while True:
            process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                code = process.wait(dice.uniform(0.2, 1.0) * seconds if tally.get(job, "kills") < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                tally.add(job, "kills")
                continue
            # Killed after its last file was written, a training has nothing left to resume, and refuses to do it again.
            was_over = job == "train" and killed.exists() and not (work / f"{job}-killed.checkpoint.pt").exists()
            if code and not was_over:
                print(f"{job}: exit code {code} of {' '.join(line)}")
                return False
            break
        tally.add(job, "compared")
        if tally.get(job, "kills") == before:
            seconds = time.monotonic() - started  # too fast to be killed: the machine was busier when it was timed
        if not is_same(whole, killed, bits=bits):
            print(f"{job}: {killed} differs from {whole}")
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per job")
    parser.add_argument("--jobs", nargs="+", default=JOBS, choices=JOBS)
    parser.add_argument("--work", type=Path, default=Path("kills"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--deterministic", action="store_true", help="the same bits on CUDA, too")
    given = parser.parse_args()
    options = ["--device", given.device, *(["--set", "engine.deterministic=true"] if given.deterministic else [])]
    bits = given.deterministic or given.device == "cpu"
    given.work.mkdir(parents=True, exist_ok=True)
    dense, tally, held = given.work / "dense.pt", Tally(given.work / "kills.json"), True
    if not dense.exists() and given.jobs != ["train"]:
        subprocess.run(
            [sys.executable, "-m", "dpm_cli", "train", "-r", "digits", "-o", str(dense), "--quiet"], check=True
        )
    for job in given.jobs:
        is_equal = run_killed(job, given.kills, given.work, dense, tally, options, bits=bits)
        kills, compared = tally.get(job, "kills"), tally.get(job, "compared")
        found = f"{'bits' if bits else 'widths'} {'equal' if is_equal else 'NOT equal'}"
        print(f"{job}: {kills} kills, {compared} finished runs compared, {found}")
        held &= is_equal
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

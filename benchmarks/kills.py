"""Kill `dpm prune` (every base) and `dpm train` at random moments, resume, and compare the final weights bit by bit.

    python benchmarks/kills.py --kills 100 --work /tmp/kills

Each job is killed by SIGKILL after a random time, again and again, until the wanted number of kills is reached; jobs
that finish begin anew. Prints kills and comparisons per job; ends with 1 if any bit differs.
"""

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

SMALL = ["--set", "data.limit=300", "--set", "export=[]", "--set", "checkpoint.every=5", "--set", "precision=fp32"]
JOBS = ["train", "depgraph", "otov2", "gate-decorator", "on-the-fly"]


def command(job: str, work: Path, name: str, dense: Path) -> tuple[list[str], Path]:
    """Return the command of a job, and the file whose weights are compared."""
    start = [sys.executable, "-m", "dpm_cli"]
    if job == "train":
        out = work / f"{name}.pt"
        return [*start, "train", "-r", "digits", "-o", str(out), "--resume", "--quiet", *SMALL], out
    out = work / name
    base = ["--set", f"prune.base={job}"]
    if job == "on-the-fly":
        base += ["--set", "prune.target.sparsity=0.5", "--set", "finetune.epochs=0"]
    if job == "otov2":
        base += ["--set", "prune.rounds=1", "--set", "train.epochs=30"]
    return [*start, "prune", str(dense), "-r", "digits", "-o", str(out), "--resume", "--quiet", *base, *SMALL], (
        out / "slim.pt"
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return content.get("state_dict", content) | {
        f"{name}.{part}": tensor for name, parts in content.get("packed", {}).items() for part, tensor in parts.items()
    }


def is_same(left: Path, right: Path) -> bool:
    ours, theirs = weights(left), weights(right)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def run_killed(job: str, kills: int, work: Path, dense: Path, dice: random.Random) -> tuple[int, int, bool]:
    """Return the kills, the comparisons, and whether all bits were equal."""
    line, whole = command(job, work, f"{job}-whole", dense)
    started = time.monotonic()
    subprocess.run(line, check=True, capture_output=True)
    seconds = time.monotonic() - started
    done = compared = 0
    while done < kills:
        line, killed = command(job, work, f"{job}-killed", dense)
        shutil.rmtree(work / f"{job}-killed", ignore_errors=True)
        (work / f"{job}-killed.pt").unlink(missing_ok=True)
        while True:
            process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                code = process.wait(dice.uniform(0.2, 1.0) * seconds if done < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
                continue
            if code:
                print(f"{job}: exit code {code} of {' '.join(line)}")
                return done, compared, False
            break
        compared += 1
        if not is_same(whole, killed):
            print(f"{job}: {killed} differs from {whole}")
            return done, compared, False
    return done, compared, True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per job")
    parser.add_argument("--jobs", nargs="+", default=JOBS, choices=JOBS)
    parser.add_argument("--work", type=Path, default=Path("kills"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    dense, dice, held = given.work / "dense.pt", random.Random(given.seed), True
    if not dense.exists():
        subprocess.run(
            [sys.executable, "-m", "dpm_cli", "train", "-r", "digits", "-o", str(dense), "--quiet"], check=True
        )
    for job in given.jobs:
        done, compared, is_equal = run_killed(job, given.kills, given.work, dense, dice)
        print(f"{job}: {done} kills, {compared} finished runs compared, {'equal' if is_equal else 'NOT equal'}")
        held &= is_equal
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

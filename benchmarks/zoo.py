"""Every family of timm, torchvision, Hugging Face vision models, the topologies: what can be cut, exactly, how fast?

    python benchmarks/zoo.py                          all, each in its own process with a time and memory limit
    python benchmarks/zoo.py resnet50 timm:visformer_tiny
    python benchmarks/zoo.py 'timm:*' --export slim --export onnx --export torchscript
    python benchmarks/zoo.py --random 12              a dozen drawn at random; the seed is printed
    python benchmarks/zoo.py --again failed           those that failed before, anew
    python benchmarks/zoo.py --summary                what the rows of earlier runs say

Rows are appended to results/zoo.jsonl as they come, and a model that has one is not measured again (--fresh begins
anew). Models have random weights with randomised, calibrated BatchNorm, so that outputs are not zero. Every group loses
a random share of its units, each another one, as far as the code allows; "difference" is relative, before and after
removal, in fp64 where fp32 is not clear. "lowest" is the share of the MACs at a tenth of every group, "reasons" the
share of the MACs in layers that each reason keeps whole. All seconds are of one CPU core: "export_s" in torch.export,
"labels_s" from its graph to groups, "rehearse_s" trying removal on copies; together they are find_groups.
A model is "ok" if removal was exact, the predicted cost is the measured one, a step in train mode works, the files
asked for give the same model again, and half of the MACs can go; "limited" if only the last is not so; "refused" if it
cannot be exported to a graph; else "FAILED".
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import random
import resource
import statistics
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import FOLDER
from zoo_models import all_names

ROWS = FOLDER / "zoo.jsonl"
MEMORY_BYTES = 12 * 2**30
SECONDS, CPU_SECONDS = 900, 300  # of the clock and of the processor
TIMES = "export_s labels_s rehearse_s".split()
PRELOADED = ["torch", "torchvision", "timm", "transformers", "torch.export", "zoo_child"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names or patterns; all without any")
    parser.add_argument("--export", action="append", default=[], choices=["slim", "onnx", "torchscript"])
    parser.add_argument("--random", type=int, metavar="N", help="measure N of them, drawn at random")
    parser.add_argument("--seed", type=int, default=None, help="of --random and of the units that go")
    parser.add_argument("--again", choices=["failed", "limited", "refused"], help="measure these results anew")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where the rows are")
    parser.add_argument("--summary", action="store_true")
    arguments = parser.parse_args()
    if arguments.fresh:
        arguments.rows.unlink(missing_ok=True)
    rows = read(arguments.rows)
    if not arguments.summary:
        seed = random.randrange(2**31) if arguments.random and arguments.seed is None else arguments.seed or 0
        print(f"seed {seed}", flush=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for model in choose(arguments, rows, seed):
            row = rows[model] = run_alone(context, model, arguments.export, seed)
            with arguments.rows.open("a") as file:
                print(json.dumps(row), file=file)
            print(json.dumps({key: value for key, value in row.items() if key != "reasons"})[:400], flush=True)
    print_summary(list(rows.values()))
    if any(row["result"].startswith("FAILED") for row in rows.values()):
        raise SystemExit(1)


def choose(arguments: argparse.Namespace, rows: dict[str, dict[str, Any]], seed: int) -> list[str]:
    """The models to be measured."""
    patterns = [name if ":" in name else f"torchvision:{name}" for name in arguments.models]
    names = all_names()
    if patterns:
        plain = [pattern for pattern in patterns if not any(mark in pattern for mark in "*?[")]
        names = plain + [
            name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns) and name not in plain
        ]
    if arguments.again:
        names = [n for n in names if rows.get(n, {"result": ""})["result"].lower().startswith(arguments.again)]
    elif not arguments.random:
        names = [name for name in names if name not in rows]
    return random.Random(seed).sample(names, min(arguments.random, len(names))) if arguments.random else names


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of every model."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["model"]: row for row in map(json.loads, lines)}


def run_alone(context: Any, model: str, exports: list[str], seed: int) -> dict[str, Any]:
    """In its own process: a crash, a hang or a memory leak of one model is one row."""
    here, there = context.Pipe(duplex=False)
    with TemporaryDirectory() as folder:
        process = context.Process(target=measure_alone, args=(there, model, exports, seed, folder), daemon=True)
        process.start()
        there.close()
        result = f"FAILED: more than {SECONDS} s"
        try:
            if here.poll(SECONDS):
                return dict(here.recv())
        except EOFError:
            result = "FAILED: the process died"
        finally:
            process.kill()
            process.join()
            here.close()
    return {"model": model, "result": result}


def measure_alone(there: Any, model: str, exports: list[str], seed: int, folder: str) -> None:
    """In the child: limits, no output, and whatever happens is a row."""
    from zoo_child import measure

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    started = time.process_time()
    row = measure(model, exports, seed, Path(folder))
    row |= {
        "cpu_s": round(time.process_time() - started, 1),
        "peak_GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    there.send(row)


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Results by source, the failures, what keeps most MACs whole, and the times."""
    for source in sorted({row["model"].partition(":")[0] for row in rows}):
        results = Counter(row["result"].partition(":")[0] for row in rows if row["model"].startswith(f"{source}:"))
        print(f"{source}: " + ", ".join(f"{number} {result}" for result, number in sorted(results.items())))
    for row in rows:
        if row["result"] != "ok":
            print(f"  {row['model']} {row['result'][:160]}")
    lost: Counter[str] = Counter()
    for row in rows:
        for reason, share in row.get("reasons", {}).items():
            lost[reason] += share
    for reason, share in lost.most_common(25):
        print(f"  kept {share:6.2f} models' MACs: {reason}")
    sums = {row["model"]: sum(row[key] for key in TIMES[1:]) for row in rows if all(key in row for key in TIMES)}
    if sums:
        worst = sorted(sums, key=lambda model: -sums[model])[:5]
        print(
            f"analysis after the export: median {statistics.median(sums.values()):.2f} s, worst "
            + ", ".join(f"{sums[model]:.1f} s ({model})" for model in worst)
        )


if __name__ == "__main__":
    main()

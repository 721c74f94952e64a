"""What the paper leaves open, tried on tuning seeds and judged on validation images; the test set plays no part.

    python benchmarks/search.py --data CIFAR10_FOLDER --work runs            trains what is missing, prints the table
    python benchmarks/search.py --data CIFAR10_FOLDER --work runs --table    only prints and writes it

DepGraph at a quarter of the MACs in the CPU scale of `paired.py`, from the dense checkpoint that it leaves in `--work`:
one setting changed at a time. Seeds begin where those of `paired.py` do not reach. Several processes share the work.
"""

import argparse
import json
import math
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import print_table, save
from paired import RELEASE, SCALES, Trial, fill, interval, make_recipe

import dpm_cli

SCALE, BUDGET = SCALES["cpu"], 0.25
FIRST_SEED, HELD_OUT = 100, 0.1
STEPS = SCALE.epochs * ((SCALE.images or 50_000) // 128)
COSINE = {"criterion": "cosine", "rate": 0.2, "length": 1.0}


def spans(first: int, last: int) -> dict[str, float]:
    """One round: chosen at step `first`, all dead at `last`."""
    return {"prune.start": first / STEPS, "prune.end": (last + 1) / STEPS}


SETTINGS: dict[str, dict[str, Any]] = {
    "SP over 70 steps": {},
    "SR, cosine > 0.2": {"decay.rectify": COSINE},
    "SR, cosine > 0.1": {"decay.rectify": COSINE | {"rate": 0.1}},
    "SR, cosine > 0.05 and length > 0.8": {"decay.rectify": COSINE | {"rate": 0.05, "length": 0.8}},
    "SR, significance > 1.5": {"decay.rectify": RELEASE | {"rate": 1.5}},
    "SR, significance > 2": {"decay.rectify": RELEASE},
    "SR, significance > 2, any length": {"decay.rectify": RELEASE | {"length": 0.0}},
    "SR, significance > 3": {"decay.rectify": RELEASE | {"rate": 3.0}},
    "SR, significance > 4": {"decay.rectify": RELEASE | {"rate": 4.0}},
    "SR, significance > 3, any length": {"decay.rectify": RELEASE | {"rate": 3.0, "length": 0.0}},
    "one cut at step 70": {"decay.steps": 1, **spans(70, 70)},
    "one cut at step 0": {"decay.steps": 1, "prune.start": 0.0},
    "SP over 35 steps": {"decay.steps": 35, **spans(0, 35)},
    "SP over 140 steps": {"decay.steps": 140, **spans(0, 140)},
    "SP over 210 steps": {"decay.steps": 210, **spans(0, 210)},
    "SP, 3 rounds of 70 steps": {"prune.rounds": 3, **spans(0, 210)},
    "SP, learning rate 0.02": {"train.lr": 0.02},
    "SP, learning rate 0.1": {"train.lr": 0.1},
    "SP, envelope multiplicative": {"decay.envelope": "multiplicative"},
    "SP, envelope shrink-only": {"decay.envelope": "shrink-only"},
}


def recipe_of(setting: str, seed: int, data: Path) -> dict[str, Any]:
    recipe = make_recipe(SCALE, data, Trial("depgraph", "+ SP", BUDGET, seed))
    recipe["data"] |= {"validation": HELD_OUT, "limit": math.ceil((SCALE.images or 50_000) / (1 - HELD_OUT))}
    for key, value in SETTINGS[setting].items():
        section, _, name = key.partition(".")
        recipe[section] |= {name: value}
    return recipe


def read(setting: str, seed: int, folder: Path) -> dict[str, Any] | None:
    path = folder / "report.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    return {
        "setting": setting,
        "seed": seed,
        "validation": report["validation_accuracy"],
        "macs": report["slim"]["macs"] / report["dense"]["macs"],
        "released": report["units"]["released"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--work", type=Path, required=True, help="where runs and the dense checkpoint are kept")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first", type=int, default=len(SETTINGS), help="only so many of the settings")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        for setting in list(SETTINGS)[: arguments.first]:
            folder = arguments.work / f"search-{re.sub('[^a-zA-Z0-9.]+', '-', setting)}-{seed}"
            if not arguments.table:
                recipe, dense = recipe_of(setting, seed, arguments.data), arguments.work / f"{SCALE.arch}.pt"
                fill(folder, partial(dpm_cli.prune, dense, recipe, output=folder, resume=True))
            rows += [row] if (row := read(setting, seed, folder)) else []
    reference = {row["seed"]: row["validation"] for row in rows if row["setting"] == next(iter(SETTINGS))}
    table = []
    for setting in SETTINGS:
        own = [row for row in rows if row["setting"] == setting]
        paired = [row["validation"] - reference[row["seed"]] for row in own if row["seed"] in reference]
        if own and paired:
            table.append(
                {
                    "setting": setting,
                    "validation %": f"{statistics.mean(row['validation'] for row in own):.2f}",
                    "difference": f"{statistics.mean(paired):+.2f} ± {interval(paired):.2f}",
                    "released": f"{statistics.mean(row['released'] for row in own):.1f}",
                    "seeds": len(own),
                }
            )
    if table:
        print_table(table)
        save("search_cpu", rows, settings=SETTINGS, scale=vars(SCALE), budget=BUDGET)


if __name__ == "__main__":
    main()

"""What pruning costs without fine-tuning, and what mean folding, recoveries and BatchNorm statistics win back.

python benchmarks/recover.py units MODEL.pt --recipe R     one-shot cut to 75 % and 50 % of the MACs, by --importance
python benchmarks/recover.py weights MODEL.pt --recipe R   sparsities after training with the penalty, and without

Both go on where they were stopped: benchmarks/results/recover-*.json holds what is done. The recipe names the data and
the training; see RESULTS.md for those used there.
"""

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import FOLDER, print_table, save
from torch import nn

import dpm_cli
from dpm_cli.data import Splits
from dpm_cli.engine.batchnorm import recalibrate_batchnorm_
from dpm_cli.engine.evaluate import evaluate_module
from dpm_cli.engine.learner import Learner
from dpm_cli.engine.precision import choose_precision
from dpm_cli.jobs.loading import load_splits
from dpm_cli.models import load_model
from dpm_cli.recipe import Recipe
from dpm_cli.recipe.sections import Target
from dpm_cli.sparse.on_the_fly import SphereTraining, cut_, find_sparse_layers
from dpm_cli.sparse.polarise import Recovery

MACS = (0.75, 0.5)
SPARSITIES = (0.3, 0.5, 0.7, 0.9)
RECOVERIES: tuple[Recovery, ...] = ("none", "mean", "signed-mean", "split-mean")
BATCHES = 20  # of training images, for means and BatchNorm statistics
CPU = torch.device("cpu")
Row = dict[str, Any]


def cut_units(model: Path, recipe: str, seed: int, overrides: list[str], importance: str) -> Iterator[Row]:
    """One run of `dpm prune` without training per target and way to recover. seed: of the images that calibrate."""
    for macs in MACS:
        row: Row = {"model": model.stem, "importance": importance, "macs": macs, "seed": seed}
        for name, fold, batches in (
            ("cut", False, 0),
            ("folded", True, 0),
            ("BatchNorm", False, BATCHES),
            ("both", True, BATCHES),
        ):
            changes = [
                f"prune.target.macs={macs}", "train.epochs=0", "finetune.epochs=0", f"compact.fold_mean={fold}",
                f"recalibrate_batches={batches}", "export=[]", f"seed={seed}", f"prune.importance={importance}",
                *overrides,
            ]  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                report = dpm_cli.prune(model, dpm_cli.load_recipe(recipe, changes), output=folder)
            row |= {"dense": report.dense.accuracy, "left": report.slim.macs / report.dense.macs}
            row[name] = report.slim.accuracy
        yield row


def train(model: nn.Module, recipe: Recipe, splits: Splits, strength: float) -> nn.Module:
    """On spheres, with the penalty, or with a strength of 0 the control; returned in plain layers."""
    model, precision = copy.deepcopy(model), choose_precision(recipe.precision, CPU)
    target = Target(sparsity=recipe.prune.target.sparsity or (0.5,))
    sparse, batch = recipe.prune.on_the_fly.model_copy(update={"strength": strength}), recipe.data.batch
    model.to(memory_format=torch.channels_last)
    prune = recipe.prune.model_copy(update={"target": target, "on_the_fly": sparse})
    training = SphereTraining(model, prune, recipe.train)
    per_epoch = len(splits.train) // batch
    learner = Learner(model, recipe.train, precision=precision, steps_per_epoch=per_epoch, seed=recipe.seed)
    augment = recipe.data.augment
    model.train()
    for epoch in range(recipe.train.epochs):
        batches = splits.train.batches(batch, seed=recipe.seed, epoch=epoch, augment=augment, drop_last=True)
        for step, (images, labels) in enumerate(batches, epoch * per_epoch):
            learner.step_(images, labels, step=step, before=[training.penalise_])
        training.epoch += 1
    training.unwrap_(model)
    return model.eval()


def cut_weights(model: Path, recipe: str, seed: int, overrides: list[str], images: int) -> Iterator[Row]:
    """Every recovery at every sparsity, of a model trained with the penalty and of a control."""
    settings = dpm_cli.load_recipe(recipe, [f"seed={seed}", *overrides])
    precision, spec, sparse = choose_precision(settings.precision, CPU), settings.model, settings.prune.on_the_fly
    splits = load_splits(settings, CPU)
    dense = load_model(model, arch=spec.arch, classes=spec.classes, shape=spec.input).module
    order = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(0))
    test = splits.test.select(order[:images].sort().values)
    layers = find_sparse_layers(dense, settings.prune.keep, keep_first=sparse.keep_first)

    def score(module: nn.Module) -> float:
        return evaluate_module(module, test, batch=500, precision=precision).accuracy

    for strength in (sparse.strength, 0.0):
        trained = train(dense, settings, splits, strength)
        row: Row = {"model": model.stem, "seed": seed, "penalty": strength, "dense": score(trained)}
        for sparsity in SPARSITIES:
            for how in RECOVERIES:
                module = copy.deepcopy(trained)
                cut_(module, layers, sparsity=sparsity, threshold=None, how=how, per=sparse.per)
                cut = score(module)
                batches = splits.train.batches(
                    settings.data.batch, seed=seed, epoch=10**6, augment=settings.data.augment
                )
                recalibrate_batchnorm_(module, batches, count=BATCHES, precision=precision)
                yield row | {"sparsity": sparsity, "recover": how, "cut": cut, "BatchNorm": score(module)}


KEYS = ("model", "importance", "macs", "seed", "penalty", "sparsity", "recover")


def mean_over_seeds(rows: list[Row]) -> list[Row]:
    """Medians would hide a seed that fails: means, and the number of seeds."""
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row.get(key) for key in KEYS if key != "seed"), []).append(row)
    means = []
    for same in grouped.values():
        row = {key: value for key, value in same[0].items() if key != "seed"}
        row |= {key: statistics.mean(each[key] for each in same) for key in row if key not in KEYS}
        means.append(row | {"seeds": len(same)})
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["units", "weights"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--importance", default="group-norm", help="what units are chosen by")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000, help="of the test set, for the sparsities")
    asked = parser.parse_args()
    name = f"recover-{asked.what}-{asked.model.stem}"
    done_file = FOLDER / f"{name}.json"
    rows: list[Row] = json.loads(done_file.read_text())["rows"] if done_file.exists() else []
    for seed in range(asked.seeds):
        if any((row["seed"], row.get("importance", "group-norm")) == (seed, asked.importance) for row in rows):
            continue
        if asked.what == "units":
            rows += cut_units(asked.model, asked.recipe, seed, asked.overrides, asked.importance)
        else:
            rows += cut_weights(asked.model, asked.recipe, seed, asked.overrides, asked.images)
        save(name, rows, recipe=Path(asked.recipe).stem, overrides=asked.overrides, images=asked.images)
    print_table(mean_over_seeds(rows))


if __name__ == "__main__":
    main()

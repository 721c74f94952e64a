"""Soft filter pruning (SFP, He et al., IJCAI 2018) and its asymptotic form (ASFP, He et al., T-CYB 2019): baselines.

After every epoch the units that a cut would take are set to zero, and go on training: the next epoch may revive them.
At the end they are cut. ASFP takes few units at first and all of them late. Units, scores and the exact MAC target are
those of the other arms, so that only the way to zero differs; the papers prune a fraction of every layer by its norms.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpm_cli.engine.batchnorm import recalibrate_batchnorm_
from dpm_cli.engine.evaluate import evaluate_module
from dpm_cli.engine.learner import Learner
from dpm_cli.engine.precision import choose_precision
from dpm_cli.graph import Units, compact_
from dpm_cli.jobs.loading import load_splits
from dpm_cli.measure import count_parameters
from dpm_cli.method.budget import choose_victims, resolve_limit
from dpm_cli.method.pruners import DepGraph
from dpm_cli.method.survey import survey
from dpm_cli.models import load_model
from dpm_cli.recipe import parse_recipe


def prune_softly(dense: Path, values: dict[str, Any], *, epochs: int, asymptotic: bool, output: Path) -> None:
    """Train, zero and cut; then write what the benchmark reads of a report. Nothing to resume: it is short."""
    recipe, device = parse_recipe(values), torch.device("cpu")
    precision, splits, started = (
        choose_precision(recipe.precision, device),
        load_splits(recipe, device),
        time.monotonic(),
    )
    spec = recipe.model
    model = load_model(dense, arch=spec.arch, classes=spec.classes, shape=spec.input).module
    torch.manual_seed(recipe.seed)
    base = DepGraph(recipe.prune, recipe.train, seed=recipe.seed)
    found = survey(model, torch.zeros(2, *spec.input), recipe.prune, base)
    groups, widths = found.groups, found.widths
    everything = np.ones(groups.units, bool)
    dense_macs, dense_params = groups.cost.macs(everything), count_parameters(model)
    dense_accuracy = evaluate_module(model, splits.test, batch=512).accuracy
    model.to(memory_format=torch.channels_last)
    limit = resolve_limit(groups, widths, kind="macs", amount=recipe.prune.target.amount)
    units, batch = Units(groups, model), recipe.data.batch
    base.bind(groups, model)
    per_epoch = len(splits.train) // batch
    learner = Learner(
        model,
        recipe.train.model_copy(update={"epochs": epochs}),
        precision=precision,
        steps_per_epoch=per_epoch,
        seed=recipe.seed,
    )
    augment = recipe.data.augment
    model.train()
    for epoch in range(epochs):
        batches = splits.train.batches(batch, seed=recipe.seed, epoch=epoch, augment=augment, drop_last=True)
        for step, (images, labels) in enumerate(batches, epoch * per_epoch):
            learner.step_(images, labels, step=step)
        # ASFP: three quarters of the way to the target after a third of the epochs, all of it at the end.
        share = 1.0
        if asymptotic:
            share = (1 - 0.25 ** (3 * (epoch + 1) / epochs)) / (1 - 0.25**3)
        now = round(dense_macs - (dense_macs - limit) * share)
        victims = choose_victims(groups, widths, base.scores(), kind="macs", limit=now)
        units.scale_(torch.from_numpy(np.where(victims, 0.0, 1.0)).float())
    compact_(model, groups, ~victims)
    batches = splits.train.batches(batch, seed=recipe.seed, epoch=epochs, augment=augment)
    recalibrate_batchnorm_(model, batches, count=recipe.recalibrate_batches, precision=precision)
    seconds = time.monotonic() - started
    report = {
        "slim": {
            "accuracy": evaluate_module(model, splits.test, batch=512).accuracy,
            "macs": groups.cost.macs(~victims),
            "params": count_parameters(model),
        },
        "dense": {"accuracy": dense_accuracy, "macs": dense_macs, "params": dense_params},
        "units": {"released": 0},
        "seconds": {"train": seconds},
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(report))

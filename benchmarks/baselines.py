"""Other ways to a small net, as baselines in the same engine: what a user would do without Smooth Pruning.

- SFP (He et al., IJCAI 2018) and ASFP (He et al., T-CYB 2019): after every epoch the units that a cut would take are
  set to zero, and go on training: the next epoch may revive them. At the end they are cut. ASFP takes few units at
  first and all of them late.
- uniform: all groups lose the same share of their units, the lowest norms first, before the first step.
- from scratch: the widths of the plain cut, with new random weights (Liu et al., ICLR 2019).
- searched: of many shares between the groups the one with the lowest loss right after the cut, with recalibrated
  BatchNorm (as EagleEye judges, Li et al., ECCV 2020; the candidates are ours), before the first step.

Units, norms, data, training steps and the exact MAC target are those of the other arms. The SFP papers prune a fraction
of every layer instead.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dpm_cli.data import Split
from dpm_cli.data.splits import Batch
from dpm_cli.engine.batchnorm import recalibrate_batchnorm_
from dpm_cli.engine.evaluate import evaluate_module
from dpm_cli.engine.learner import Learner
from dpm_cli.engine.precision import Precision, choose_precision
from dpm_cli.graph import Groups, Units, compact_
from dpm_cli.graph.labels import Flags
from dpm_cli.jobs.loading import load_splits
from dpm_cli.measure import count_parameters
from dpm_cli.method.budget import Scores, choose_victims, rank, resolve_limit
from dpm_cli.method.pruners import DepGraph
from dpm_cli.method.survey import survey
from dpm_cli.models import build, load_model
from dpm_cli.recipe import Recipe, parse_recipe

Baseline = Literal["SFP", "ASFP", "uniform", "from scratch", "searched"]
CANDIDATES, SPREAD, PARENTS = (
    60,
    0.2,
    5,
)  # of the search: a third at random around the plain cut, the rest from the best
CALIBRATED_BY, JUDGED_BY = 8, 10  # batches of training images


def run_baseline(baseline: Baseline, dense: Path, values: dict[str, Any], *, epochs: int, output: Path) -> None:
    """Train, cut and measure; then write what the benchmark reads of a report. Nothing to resume: it is short."""
    recipe = parse_recipe(values)
    splits = load_splits(recipe, torch.device("cpu"))
    spec, is_soft = recipe.model, baseline in ("SFP", "ASFP")
    model = load_model(dense, arch=spec.arch, classes=spec.classes, shape=spec.input).module
    torch.manual_seed(recipe.seed)
    base = DepGraph(recipe.prune, recipe.train, seed=recipe.seed)
    found = survey(model, torch.zeros(2, *spec.input), recipe.prune, base)
    groups, widths = found.groups, found.widths
    dense_macs, dense_params = groups.cost.macs(np.ones(groups.units, bool)), count_parameters(model)
    dense_accuracy = evaluate_module(model, splits.test, batch=512).accuracy
    limit = resolve_limit(groups, widths, kind="macs", amount=recipe.prune.target.limits["macs"])
    started = time.monotonic()
    base.bind(groups, model)

    def choose(scores: Scores, limit: int) -> Flags:
        return choose_victims(groups, widths, scores, kind="macs", limit=limit)

    scores = base.scores()
    victims = choose(rank_within(groups, scores) if baseline == "uniform" else scores, limit)
    if baseline == "searched":
        # In an order of their own: a folder's first images are of one class, and so would BatchNorm's statistics be.
        batches = list(islice(batches_of(splits.train, recipe, epochs), CALIBRATED_BY + JUDGED_BY))
        judge = partial(judge_cut, model, groups, recipe, batches)
        victims = search_shares(groups, lambda factors: choose(scores * factors, limit), judge, recipe.seed)
    if baseline == "from scratch":
        model = build(spec.arch, classes=spec.classes, shape=spec.input)
    if not is_soft:
        compact_(model, groups, ~victims)
    model.to(memory_format=torch.channels_last)

    def end_epoch(epoch: int) -> None:
        nonlocal victims
        if is_soft:
            share = fall(epoch, epochs) if baseline == "ASFP" else 1.0
            victims = choose(base.scores(), round(dense_macs - (dense_macs - limit) * share))
            Units(groups, model).scale_(torch.from_numpy(np.where(victims, 0.0, 1.0)).float())

    train_(model, splits.train, recipe, epochs=epochs, end_epoch=end_epoch)
    if is_soft:
        compact_(model, groups, ~victims)
    count = recipe.recalibrate_batches
    recalibrate_batchnorm_(model, batches_of(splits.train, recipe, epochs), count=count, precision=precision_of(recipe))
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


def train_(model: nn.Module, images: Split, recipe: Recipe, *, epochs: int, end_epoch: Callable[[int], object]) -> None:
    """Train as `recipe.train` says, for other epochs than it says."""
    per_epoch = len(images) // recipe.data.batch
    training = recipe.train.model_copy(update={"epochs": epochs})
    learner = Learner(model, training, precision=precision_of(recipe), steps_per_epoch=per_epoch, seed=recipe.seed)
    model.train()
    for epoch in range(epochs):
        for step, batch in enumerate(batches_of(images, recipe, epoch, drop_last=True), epoch * per_epoch):
            learner.step_(*batch, step=step)
        end_epoch(epoch)


def batches_of(images: Split, recipe: Recipe, epoch: int, *, drop_last: bool = False) -> Iterator[Batch]:
    """Visit the images once, as training does."""
    data = recipe.data
    return images.batches(data.batch, seed=recipe.seed, epoch=epoch, augment=data.augment, drop_last=drop_last)


def precision_of(recipe: Recipe) -> Precision:
    return choose_precision(recipe.precision, torch.device("cpu"))


def search_shares(
    groups: Groups, choose: Callable[[Scores], Flags], judge: Callable[[Flags], float], seed: int
) -> Flags:
    """Return (units,) the victims with the lowest loss. choose: the victims for (units,) factors of their scores."""
    dice, tried = np.random.default_rng(seed), list[tuple[float, Scores, Flags]]()
    for number in range(CANDIDATES):
        factors, spread = np.ones(len(groups)), SPREAD if number else 0.0
        if number >= CANDIDATES // 3:
            best = sorted(tried, key=lambda each: each[0])[:PARENTS]
            factors, spread = best[dice.integers(len(best))][1], SPREAD / 2
        factors = factors * np.exp(dice.normal(0, spread, len(groups)))
        victims = choose(factors[groups.group_of_unit])
        tried.append((judge(victims), factors, victims))
    return min(tried, key=lambda each: each[0])[2]


@torch.no_grad()
def judge_cut(model: nn.Module, groups: Groups, recipe: Recipe, batches: list[Batch], victims: Flags) -> float:
    """Mean loss of the model without the victims, on the later batches, after BatchNorm has seen the others."""
    cut, calibrating, judging = copy.deepcopy(model), batches[:CALIBRATED_BY], batches[CALIBRATED_BY:]
    compact_(cut, groups, ~victims)
    cut.to(memory_format=torch.channels_last)
    recalibrate_batchnorm_(cut, iter(calibrating), count=CALIBRATED_BY, precision=precision_of(recipe))
    cut.eval()
    losses = [F.cross_entropy(cut(images), labels).item() for images, labels in judging]
    return statistics.mean(losses)


def rank_within(groups: Groups, scores: Scores) -> Scores:
    """Rank (units,) scores within each group, from just above 0 to 1: a global cut then takes equal shares."""
    return np.concatenate([(rank(scores[group.range]) + 1) / group.size for group in groups])


def fall(epoch: int, epochs: int) -> float:
    """ASFP's share of the way to the target: three quarters after a third of the epochs, all of it at the end."""
    return float((1 - 0.25 ** (3 * (epoch + 1) / epochs)) / (1 - 0.25**3))

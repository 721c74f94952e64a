import copy
import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_choice import choose_plainly
from torch import nn

from dpm_cli.data import load_data
from dpm_cli.data.digits import read_digits
from dpm_cli.engine.checkpoint import load_checkpoint
from dpm_cli.engine.precision import choose_precision
from dpm_cli.engine.setup import Setup
from dpm_cli.errors import FormatError, Interrupted, OutputError, RecipeError, RunError, TargetError
from dpm_cli.events import EpochEnded, Note
from dpm_cli.files import CHECKPOINT
from dpm_cli.jobs.loading import follow, make_setup
from dpm_cli.measure import count_macs, count_parameters, measure_in_turns
from dpm_cli.method.pruners import DepGraph
from dpm_cli.models import load_slim
from dpm_cli.recipe import parse_recipe
from dpm_cli.recipe.sections import Data
from dpm_cli.report import Report
from dpm_cli.run import delivery
from dpm_cli.run.journal import Journal
from dpm_cli.run.story import Run

FP32 = choose_precision("fp32", torch.device("cpu"))
BATCH, PER_EPOCH = 32, 6  # 230 training images


class Net(nn.Module):
    """Two groups (8 units tied by a residual add, 12 of their own), and dropout, which draws from torch's dice."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.back, self.dropout = nn.Conv2d(12, 8, 1), nn.Dropout(dropout)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.inner_norm(self.inner(x))))
        return self.head(self.dropout(x).mean((2, 3)))


def make_net(dropout=0.1, kind=Net):
    torch.manual_seed(3)
    net = kind(dropout)
    net(torch.randn(64, 1, 8, 8))  # moves the running statistics
    return net.eval()


@pytest.fixture(scope="module")
def splits():
    return load_digits()


def load_digits(**changes):
    return load_data(Data(**({"name": "digits", "limit": 230} | changes)), shape=(1, 8, 8), classes=10, seed=0)


@pytest.fixture(autouse=True)
def _short_latencies(monkeypatch):
    monkeypatch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))


def make_recipe(*overrides):
    values = {
        "model": {"arch": "own", "input": [1, 8, 8]},
        "data": {"name": "digits", "batch": BATCH, "augment": {"crop": 1, "flip": False}},
        "prune": {"target": {"macs": 0.5}, "rounds": 2, "round_to": 1},
        "decay": {"steps": 4, "rectify": False},
        "train": {"epochs": 3, "lr": 0.05, "distill": 0},
        "finetune": {"epochs": 1, "lr": 0.02, "distill": 0},
        "export": [],
        "precision": "fp32",
        "recalibrate_batches": 2,
        "checkpoint": {"every": 5},
    }
    return parse_recipe(values, overrides)


def make_run(output, recipe, splits, *, model=None, precision=FP32, should_stop=lambda: False):
    setup = make_setup(recipe, splits, Path(output) / CHECKPOINT, torch.device("cpu"), should_stop)
    return Run(
        recipe, dataclasses.replace(setup, precision=precision), model or make_net(), arch=None, output=Path(output)
    )


def go(output, recipe, splits, *, resume=False, **settings):
    """The whole run, its events and its report."""
    run, events = make_run(output, recipe, splits, **settings), []
    return run, events, follow(run.events(resume=resume), events.append)


def checkpoint_in(folder):
    return load_checkpoint(Path(folder) / CHECKPOINT)


def stop_after(steps):
    """True after so many training steps."""
    taken = iter(range(1, 10**9))
    return lambda: next(taken) == steps


def tensors_of(output):
    return load_slim(Path(output) / "slim.pt", model=make_net()).module.state_dict()


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def metrics(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def timeless(events):
    """What two runs that do the same must agree on."""
    return [
        {
            key: value
            for key, value in event.items()
            if key not in ("seconds", "images_per_second", "waiting_for_data", "path")
        }
        for event in events
    ]


# ------------------------------------------------------------------------------------------------- a run to its end


@pytest.mark.thorough
def test_events_come_in_order_and_the_report_agrees_with_the_files(tmp_path, splits):
    _, events, report = go(tmp_path, make_recipe(), splits)
    named = [event.kind for event in events if event.kind not in ("step", "checkpoint", "units", "mistake")]
    assert named == [
        "start", "stage", "round", "compact", "round", "epoch", "compact", "epoch", "epoch",
        "stage", "epoch", "phase", "done",
    ]  # fmt: skip
    steps = [event for event in events if event.kind == "step"]
    assert [event.step for event in steps] == [*range(1, 19), *range(1, 7)]
    assert [event.epoch for event in steps if event.stage == "train"] == [1] * 6 + [2] * 6 + [3] * 6

    written = [json.loads(json.dumps(event.to_dict())) for event in events if event.is_logged]
    assert {event["event"] for event in written} >= {"round", "units", "compact", "epoch"}
    assert metrics(tmp_path) == written
    start, slim = events[0], load_slim(tmp_path / "slim.pt", model=make_net())
    assert report.target.is_met
    assert report.target.limit == math.floor(0.5 * start.dense.macs)
    assert report.slim.params == sum(p.numel() for p in slim.module.parameters()) == count_parameters(slim.module)
    assert report.slim.macs == count_macs(slim.module, torch.zeros(1, 1, 8, 8)) == report.target.reached
    assert report.dense.macs == start.dense.macs == report.target.dense
    assert report.units.total == 20
    assert report.units.removed == report.units.chosen == sum(e.removed for e in events if e.kind == "compact")
    assert {width.layer: width.after for width in report.widths} == {
        "stem": slim.module.stem.out_channels,
        "inner": slim.module.inner.out_channels,
        "back": slim.module.back.out_channels,
    }
    assert report.compact_difference <= 1e-5
    assert report.validation_accuracy is not None
    assert json.loads((tmp_path / "report.json").read_text()) == slim.report == json.loads(report.to_json())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "model.json",
        "recipe.yaml",
        "report.json",
        "slim.pt",
    ]
    correct = [
        (slim.module(images).argmax(1) == labels).double().mean().item()
        for images, labels in splits.test.batches(len(splits.test), seed=0, epoch=0, augment=None)
    ]
    assert report.slim.accuracy == pytest.approx(100 * correct[0])


def test_the_given_model_is_left_as_it_was(tmp_path, splits):
    model = make_net()
    before = copy.deepcopy(model.state_dict())
    go(tmp_path, make_recipe("finetune.epochs=0"), splits, model=model)
    assert_same_bits(model.state_dict(), before)
    assert not model.training


@pytest.mark.parametrize("target", ["macs=30000", "params=0.4", "channels=9"])
def test_every_kind_of_target_is_met(tmp_path, splits, target):
    _, _, report = go(tmp_path, make_recipe(f"prune.target.{target}", "finetune.epochs=0"), splits)
    kind = report.target.kind
    slim = load_slim(tmp_path / "slim.pt", model=make_net()).module
    cost = {
        "macs": count_macs(slim, torch.zeros(1, 1, 8, 8)),
        "params": count_parameters(slim),
        "channels": slim.stem.out_channels + slim.inner.out_channels,
    }[kind]
    assert cost == report.target.reached <= report.target.limit
    assert cost > 0.8 * report.target.limit


RELEASE_ALL = [
    "decay.rectify=true", *(f"decay.rectify.{rule}" for rule in ("rate=-1e9", "length=-1e9", "start=0", "smoothing=0")),
]  # fmt: skip


@pytest.mark.parametrize("base", ["depgraph", "gate-decorator"])
def test_everything_released_still_meets_the_target(tmp_path, splits, base):
    run, events, report = go(tmp_path, make_recipe(f"prune.base={base}", "finetune.epochs=0", *RELEASE_ALL), splits)
    rounds = [event for event in events if event.kind == "round"]
    assert len(rounds) == 3
    assert report.units.released == sum(event.chosen for event in rounds[:2])
    assert report.units.removed == run.subject.pruning.topped_up == rounds[2].chosen
    assert report.target.is_met
    assert f"{rounds[2].chosen} units were chosen by score alone" in report.notes[0]
    assert "others were released" in report.notes[0]


def test_unit_that_was_released_rests_until_its_round_is_over(tmp_path, splits):
    recipe = make_recipe("prune.base=otov2", "prune.otov2.strength=3", "finetune.epochs=0", *RELEASE_ALL)
    run, events, report = go(tmp_path, recipe, splits)
    rounds = [event for event in events if event.kind == "round"]
    assert len(rounds) == 2
    assert 0 < report.units.released <= 20  # each once: a unit is not marked again in the same round
    assert report.units.chosen == report.units.released + rounds[1].chosen
    assert report.units.removed == run.subject.pruning.topped_up == rounds[1].chosen
    assert report.target.is_met


@pytest.mark.parametrize("base", ["depgraph", "otov2", "gate-decorator"])
@pytest.mark.thorough
def test_penalties_and_hooks_are_over_when_the_target_is_met(tmp_path, splits, monkeypatch, base):
    """And fine-tuning sees none of them, nor a gate."""
    recipe = make_recipe(f"prune.base={base}", "prune.otov2.strength=3", "decay.steps=1")
    run = make_run(tmp_path, recipe, splits)
    pruning, calls, kind = run.subject.pruning, [], type(run.subject.pruning.base)
    before_step_ = kind.before_step_
    monkeypatch.setattr(kind, "before_step_", lambda self: (calls.append(pruning.is_done), before_step_(self)))
    for event in run.events():
        if event.kind == "stage" and event.name == "finetune":
            assert run.subject.model.state_dict().keys() == make_net().state_dict().keys()
    assert calls
    assert not any(calls)


def test_validation_of_zero_and_fewer_images_than_a_batch(tmp_path):
    splits = load_digits(validation=0, limit=20)
    recipe = make_recipe("train.epochs=6", "prune.end=1.0", "decay.steps=3")
    _, events, report = go(tmp_path, recipe, splits)
    epochs = [event for event in events if event.kind == "epoch"]
    assert len(epochs) == 7
    assert all(event.validation_accuracy is None for event in epochs)
    assert report.validation_accuracy is None
    assert report.target.is_met
    # The statistics are those of the only batch there is: all 20 images, seen with the final weights.
    slim = load_slim(tmp_path / "slim.pt", model=make_net()).module
    ((images, _),) = splits.train.batches(32, seed=0, epoch=7, augment=run_augmentation(recipe))
    torch.testing.assert_close(slim.norm.running_mean, slim.stem(images).mean((0, 2, 3)))


def run_augmentation(recipe):
    return recipe.data.augment


def test_stages_and_their_first_epochs(tmp_path, splits):
    stages = make_run(tmp_path, make_recipe("prune.sparse_epochs=2", "prune.sparse_lr=0.003"), splits).subject.stages
    assert [(stage.name, stage.first_epoch, stage.training.epochs) for stage in stages] == [
        ("sparse", 0, 2), ("train", 2, 3), ("finetune", 5, 1),
    ]  # fmt: skip
    assert (stages[0].training.weight_decay, stages[0].training.lr) == (0, 0.003)
    without = make_run(tmp_path, make_recipe("finetune.epochs=0"), splits)
    assert [stage.name for stage in without.subject.stages] == ["train"]


# ---------------------------------------------------------------------------------------------------- without training

CUT_AT_ONCE = ("train.epochs=0", "finetune.epochs=0", "recalibrate_batches=0")


def logits_of(module, splits):
    (images, _) = next(splits.train.batches(200, seed=0, epoch=0, augment=None))
    with torch.no_grad():
        return module.eval()(images)


def test_without_training_units_are_cut_at_once_and_the_target_is_met(tmp_path, splits):
    run, events, report = go(tmp_path, make_recipe(*CUT_AT_ONCE, "compact.fold_mean=false"), splits)
    names = [event.kind for event in events if event.kind not in ("checkpoint", "units", "mistake")]
    assert names == ["start", "stage", "round", "compact", "phase", "done"]
    assert report.target.is_met
    assert report.units.removed == report.units.chosen > 0
    dense, slim = make_net(), load_slim(tmp_path / "slim.pt", model=make_net()).module
    kept = torch.from_numpy(run.subject.pruning.ancestry.survivors[8:])  # of `inner`
    assert torch.equal(slim.inner_norm.running_mean, dense.inner_norm.running_mean[kept])


@pytest.mark.parametrize("labels", ["true", "false"])
def test_gradients_are_looked_at_without_a_change(tmp_path, splits, labels, monkeypatch):
    """Neither the weights of what stays nor the running statistics change by it."""
    shown, observe = [], DepGraph.observe_
    monkeypatch.setattr(DepGraph, "observe_", lambda base: shown.append(base) or observe(base))
    recipe = make_recipe(*CUT_AT_ONCE, "compact.fold_mean=false", "prune.importance=fisher", "prune.observe_batches=4")
    run, _, report = go(tmp_path, recipe, dataclasses.replace(splits, labelled=labels == "true"))
    assert report.target.is_met
    assert shown == 4 * [run.subject.pruning.base]
    dense, slim = make_net(), load_slim(tmp_path / "slim.pt", model=make_net()).module
    kept = torch.from_numpy(run.subject.pruning.ancestry.survivors[8:])  # of `inner`
    assert torch.equal(slim.inner_norm.running_mean, dense.inner_norm.running_mean[kept])
    assert torch.equal(slim.inner_norm.weight, dense.inner_norm.weight[kept])
    assert all(parameter.grad is None for parameter in run.subject.model.parameters())


def test_fine_tuning_can_follow_a_cut_without_training(tmp_path, splits):
    _, events, _ = go(tmp_path, make_recipe("train.epochs=0"), splits)
    named = [event.kind for event in events if event.kind not in ("step", "checkpoint", "units", "mistake")]
    assert named == ["start", "stage", "round", "compact", "stage", "epoch", "phase", "done"]


def test_folded_means_bring_the_outputs_nearer_to_the_dense_model(tmp_path, splits):
    dense, errors = logits_of(make_net(dropout=0), splits), []
    for fold in ("false", "true"):
        folder = tmp_path / fold
        folder.mkdir()
        go(folder, make_recipe(*CUT_AT_ONCE, f"compact.fold_mean={fold}"), splits, model=make_net(dropout=0))
        slim = load_slim(folder / "slim.pt", model=make_net()).module
        errors.append((logits_of(slim, splits) - dense).norm())
    assert errors[1] < 0.8 * errors[0]


class Functional(Net):
    """Uses the weights of `back` without calling it."""

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.conv2d(F.relu(self.inner_norm(self.inner(x))), self.back.weight, self.back.bias)
        return self.head(self.dropout(x).mean((2, 3)))


@pytest.mark.parametrize(("rounds", "is_stopped"), [(2, False), (1, True)])
def test_layers_that_take_no_means_are_told_once(tmp_path, splits, rounds, is_stopped):
    recipe = make_recipe("decay.steps=1", "compact.fold_mean=true", f"prune.rounds={rounds}", "prune.keep=[stem]")
    if is_stopped:
        with pytest.raises(Interrupted):
            go(tmp_path, recipe, splits, model=make_net(kind=Functional), should_stop=lambda: True)
    _, _, report = go(tmp_path, recipe, splits, model=make_net(kind=Functional), resume=is_stopped)
    assert [note.partition(",")[0] for note in report.notes if "folded" in note] == ["no means were folded into back"]


def test_means_are_folded_when_no_training_follows_unless_the_recipe_says_otherwise():
    assert make_recipe(*CUT_AT_ONCE).folds_means
    assert not make_recipe("train.epochs=0").folds_means
    assert make_recipe("train.epochs=0", "compact.fold_mean=true").folds_means
    assert not make_recipe(*CUT_AT_ONCE, "compact.fold_mean=false").folds_means
    assert make_recipe("decay.steps=1", "compact.fold_mean=true").folds_means
    with pytest.raises(RecipeError, match="units that decay leave nothing behind"):
        make_recipe("compact.fold_mean=true")


class Bare(Net):
    """Its `back` has neither a bias nor a BatchNorm behind it."""

    def __init__(self):
        super().__init__(dropout=0)
        self.back = nn.Conv2d(12, 8, 1, bias=False)


def test_a_layer_without_a_place_for_means_gets_a_bias(tmp_path, splits):
    torch.manual_seed(3)
    model = Bare()
    model(torch.randn(64, 1, 8, 8))
    _, events, report = go(tmp_path, make_recipe(*CUT_AT_ONCE), splits, model=model.eval())
    slim = load_slim(tmp_path / "slim.pt", model=Bare()).module
    assert slim.back.bias.abs().sum() > 0
    assert model.back.bias is None
    compacted = next(event for event in events if event.kind == "compact")
    assert report.slim.params == count_parameters(slim) == compacted.params
    assert report.notes == []


@pytest.mark.thorough
def test_one_step_pruning_folds_at_every_round(tmp_path, splits):
    changes = ["decay.steps=1", "finetune.epochs=0"]
    runs = []
    for fold in ("false", "true"):
        folder = tmp_path / fold
        folder.mkdir()
        runs.append(go(folder, make_recipe(*changes, f"compact.fold_mean={fold}"), splits)[1])
    losses = [[event.loss for event in events if event.kind == "epoch"] for events in runs]
    assert [sum(event.kind == "compact" for event in events) for events in runs] == [2, 2]
    assert losses[0] != losses[1]


def test_sparse_learning_shrinks_what_will_go(tmp_path, splits):
    changes = ["prune.sparse_epochs=2", "finetune.epochs=0", "prune.sparse_lr=0.05"]
    norms = []
    for strength in (0, 0.3):
        folder = tmp_path / str(strength)
        folder.mkdir()
        run = make_run(folder, make_recipe(*changes, f"prune.sparse_strength={strength}"), splits)
        for event in run.events():
            if event.kind == "round":
                norms.append(run.subject.pruning.units.norm().min().item())
                break
    assert norms[1] < 0.5 * norms[0]


# ------------------------------------------------------------------------------- the base pruner itself, bit for bit


def plain_pruning(model, recipe, splits, starts):
    """One-step magnitude pruning as a loop of its own: rank, zero, cut by hand, train. Returns the model."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
    settings, steps = recipe.train, recipe.train.epochs * PER_EPOCH

    def macs(rows, inner):  # 64 positions: stem 1→rows and inner rows→inner are 3×3, back inner→rows is 1×1
        return 64 * (9 * rows + 9 * rows * inner + inner * rows) + 10 * rows

    dense = macs(8, 12)
    limit = math.floor(dense * recipe.prune.target.macs)

    def new_optimizer(momenta):
        optimizer = torch.optim.SGD(
            model.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        for name, parameter in model.named_parameters():
            if momenta:
                optimizer.state[parameter]["momentum_buffer"] = momenta[name]
        return optimizer

    def square(tensor, axis):
        return (tensor.detach().double().numpy() ** 2).sum(tuple(k for k in range(tensor.dim()) if k != axis))

    optimizer, step = new_optimizer({}), 0
    torch.manual_seed(recipe.seed)
    for epoch in range(settings.epochs):
        batches = splits.train.batches(
            BATCH, seed=recipe.seed, epoch=epoch, augment=run_augmentation(recipe), drop_last=True
        )
        for images, labels in batches:
            if step in starts:
                first = square(model.stem.weight, 0) + square(model.back.weight, 0) + square(model.norm.weight, 0)
                first = (first + square(model.inner.weight, 1) + square(model.head.weight, 1)) / 5
                second = square(model.inner.weight, 0) + square(model.inner_norm.weight, 0)
                second = (second + square(model.back.weight, 1)) / 3
                scores = {(0, unit): score / first.mean() for unit, score in enumerate(first)}
                scores |= {(1, unit): score / second.mean() for unit, score in enumerate(second)}
                share = dense - (dense - limit) * (starts.index(step) + 1) // len(starts)

                def left(taken, scores=scores):
                    return [sorted(unit for group, unit in scores.keys() - taken if group == side) for side in (0, 1)]

                gone = choose_plainly(
                    scores,
                    lambda taken, left=left, share=share: macs(*map(len, left(taken))) <= share,
                    lambda unit, taken, left=left: len(left(taken)[unit[0]]) > math.ceil(0.1 * (8, 12)[unit[0]]),
                )
                rows, inner = map(torch.tensor, left(gone))
                cut = {
                    "stem.weight": (rows,), "stem.bias": (rows,), "norm.weight": (rows,), "norm.bias": (rows,),
                    "norm.running_mean": (rows,), "norm.running_var": (rows,), "inner.weight": (inner, rows),
                    "inner_norm.weight": (inner,), "inner_norm.bias": (inner,), "inner_norm.running_mean": (inner,),
                    "inner_norm.running_var": (inner,), "back.weight": (rows, inner), "back.bias": (rows,),
                    "head.weight": (slice(None), rows),
                }  # fmt: skip

                def kept(name, tensor, cut=cut):
                    for axis, index in enumerate(cut.get(name, ())):
                        tensor = tensor[index] if axis == 0 else tensor[:, index]
                    return tensor

                momenta = {
                    name: kept(name, optimizer.state[parameter]["momentum_buffer"])
                    for name, parameter in model.named_parameters()
                    if parameter in optimizer.state
                }
                for name, tensor in list(model.state_dict(keep_vars=True).items()):
                    path, _, leaf = name.rpartition(".")
                    new = kept(name, tensor.detach())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    setattr(model.get_submodule(path), leaf, nn.Parameter(new) if is_parameter else new)
                model.to(memory_format=torch.channels_last)
                optimizer = new_optimizer(momenta)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
            optimizer.step()
            step += 1
    return model


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.thorough
def test_one_step_without_rectifying_is_the_base_pruner_bit_for_bit(tmp_path, splits, seed):
    recipe = make_recipe(
        "decay.steps=1", "prune.rounds=3", "prune.start=0.2", "finetune.epochs=0", "recalibrate_batches=0",
        f"seed={seed}",
    )  # fmt: skip
    run, events, _ = go(tmp_path, recipe, splits)
    starts = [event.step for event in events if event.kind == "round"]
    assert starts == [4, 5, 6]
    assert [event.step for event in events if event.kind == "compact"] == starts
    reference = plain_pruning(make_net(), recipe, splits, starts)
    assert reference.stem.weight.shape[0] + reference.inner.weight.shape[0] < 20
    assert_same_bits(run.subject.model.state_dict(), reference.state_dict())
    assert_same_bits(tensors_of(tmp_path), reference.state_dict())


# ------------------------------------------------------------------------------------------------------------ resume

VARIANTS = {
    "plain": [],
    "one step": ["decay.steps=1"],
    "rectify": [
        "decay.rectify.criterion=cosine", "decay.rectify.rate=-0.02", "decay.rectify.length=0.9",
        "decay.rectify.hits=2",
    ],
    "sparse adamw": [
        "prune.sparse_epochs=1", "train.optimizer=adamw", "train.lr=0.01", "finetune.optimizer=adamw",
        "finetune.lr=0.003", "train.clip_grad=1.0",
    ],
    "mixup distill": [
        "train.mixup=0.4", "train.distill=0.5", "finetune.distill=0.3", "finetune.label_smoothing=0.1",
        "decay.envelope=shrink-only", "train.warmup_epochs=0.5",
    ],
    "otov2": [
        "prune.base=otov2", "prune.otov2.strength=1.5", "prune.end=0.55", "prune.target.macs=0.3", "train.momentum=0",
        "decay.rectify.criterion=cosine", "decay.rectify.rate=-0.05", "decay.rectify.length=0.8",
    ],
    "hesso": ["prune.base=otov2", "prune.otov2.variant=hesso", "decay.envelope=multiplicative"],
    "gate-decorator": [
        "prune.base=gate-decorator", "prune.gates.tick_lr=0.01", "train.epochs=2", "decay.rectify.criterion=cosine",
        "decay.rectify.rate=0.02", "decay.rectify.length=0.8",
    ],
    "fixed ticks": [
        "prune.base=gate-decorator", "prune.gates.tick_lr=0.01", "prune.gates.fraction=0.1", "prune.rounds=4",
        "prune.gates.ticks_per_tock=2", "train.epochs=2", "decay.steps=6",
    ],
    "fisher": ["prune.importance=fisher", "prune.observe_batches=3", "prune.rounds=2"],
}  # fmt: skip


def often(names, *chosen):
    """All names as parameters; those that are not chosen are thorough."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.thorough) for name in names]


@pytest.fixture(scope="module")
def whole(splits, tmp_path_factory):
    """Variant -> the folder of its uninterrupted run."""
    made = {}

    def run(variant):
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))
                go(made[variant], make_recipe(*VARIANTS[variant]), splits)
        return made[variant]

    return run


def resume_to_the_end(folder, recipe, splits, should_stop):
    """Interrupt and resume a run until it is finished; says how often that was."""
    for attempt in range(100):
        run = make_run(folder, recipe, splits, should_stop=should_stop(attempt))
        try:
            list(run.events(resume=attempt > 0))
        except Interrupted:
            continue
        return attempt
    raise AssertionError("never finished")


@pytest.mark.parametrize("variant", often(VARIANTS, "plain", "rectify", "gate-decorator"))
@pytest.mark.every(5)
def test_stopped_runs_end_with_the_bits_of_an_uninterrupted_one(tmp_path, splits, whole, variant):
    recipe = make_recipe(*VARIANTS[variant])
    stops = np.random.default_rng(len(variant)).integers(1, 7, 100).tolist()  # steps between interruptions
    count = resume_to_the_end(tmp_path, recipe, splits, lambda attempt: stop_after(stops[attempt]))
    assert count >= 3
    assert_same_bits(tensors_of(tmp_path), tensors_of(whole(variant)))
    assert timeless(metrics(tmp_path)) == timeless(metrics(whole(variant)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", often(VARIANTS, "plain", "rectify", "gate-decorator"))
def test_stopping_after_every_single_step_changes_nothing(tmp_path, splits, whole, variant):
    recipe = make_recipe(*VARIANTS[variant])
    resume_to_the_end(tmp_path, recipe, splits, lambda attempt: lambda: True)
    assert_same_bits(tensors_of(tmp_path), tensors_of(whole(variant)))
    assert timeless(metrics(tmp_path)) == timeless(metrics(whole(variant)))


@pytest.mark.thorough
def test_the_variants_above_visit_what_is_hard_to_resume(whole):
    """Or the tests above would say little: removals in the middle of a long round, decays across stages, releases."""
    events = metrics(whole("otov2"))
    (choosing, *_) = [event for event in events if event["event"] == "round"]
    removals = [event for event in events if event["event"] == "compact" and event["round"] == 1]
    assert choosing["condemning"]
    assert len(removals) > 1
    assert removals[0]["removed"] > 0
    assert sum(event["released"] for event in removals) > 0
    for variant in ("gate-decorator", "fixed ticks"):
        removals = [event for event in metrics(whole(variant)) if event["event"] == "compact"]
        assert {event["stage"] for event in removals} == {"tick", "tock"}
    assert sum(event["released"] for event in metrics(whole("gate-decorator")) if event["event"] == "compact") > 0


@pytest.mark.thorough
def test_dropped_runs_go_on_from_their_last_checkpoint(tmp_path, splits, whole):
    """As if killed: between any two events, in stages and between them, while exporting and measuring."""
    recipe = make_recipe(*VARIANTS["rectify"])
    for attempt, length in enumerate([9, 14, 4, 20, 20, 60]):
        run = make_run(tmp_path, recipe, splits)
        events = run.events(resume=attempt > 0)
        for _, event in zip(range(length), events):
            if event.kind == "phase":
                break
        events.close()
    assert event.kind == "phase"
    assert not (tmp_path / "slim.pt").exists()
    _, events, _ = go(tmp_path, recipe, splits, resume=True)
    assert [event.kind for event in events][:2] == ["start", "resumed"]
    assert (events[1].stage, events[1].before) == ("export", 24)
    assert_same_bits(tensors_of(tmp_path), tensors_of(whole("rectify")))
    assert timeless(metrics(tmp_path)) == timeless(metrics(whole("rectify")))


def test_resuming_before_the_first_checkpoint_says_so_and_starts_anew(tmp_path, splits, whole):
    _, events, _ = go(tmp_path, make_recipe(), splits, resume=True)
    assert events[1].kind == "note"
    assert "no checkpoint" in events[1].text
    assert_same_bits(tensors_of(tmp_path), tensors_of(whole("plain")))


@pytest.mark.thorough
def test_damaged_checkpoint_is_passed_over_and_noted(tmp_path, splits, whole):
    with pytest.raises(Interrupted):
        go(tmp_path, make_recipe(), splits, should_stop=stop_after(13))
    damaged = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(damaged)
    _, events, report = go(tmp_path, make_recipe(), splits, resume=True)
    assert events[1].step == 10
    assert any("was damaged" in note for note in report.notes)
    assert Note(report.notes[0]) in events
    assert_same_bits(tensors_of(tmp_path), tensors_of(whole("plain")))


def test_checkpoint_holds_no_more_than_weights_only_allows(tmp_path, splits):
    with pytest.raises(Interrupted, match=r"stage train at step 3; continue with --resume"):
        go(tmp_path, make_recipe(), splits, should_stop=stop_after(3))
    checkpoint = checkpoint_in(tmp_path)
    assert (checkpoint.state["stage"], checkpoint.state["step"]) == (0, 3)
    assert checkpoint.state["in_stage"]["meter"]["images"] == 3 * BATCH


@pytest.mark.parametrize("change", ["train.lr=0.06", "prune.target.macs=0.6", "seed=1"])
def test_resume_with_another_recipe_is_refused(tmp_path, splits, change):
    with pytest.raises(Interrupted):
        go(tmp_path, make_recipe(), splits, should_stop=stop_after(2))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(OutputError, match=r"made with another recipe \(.* there, .* here\)") as refusal:
        go(tmp_path, make_recipe(change), splits, resume=True)
    assert change.split("=")[0].split(".")[-1] in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_resume_with_other_weights_is_refused(tmp_path, splits):
    with pytest.raises(Interrupted):
        go(tmp_path, make_recipe(), splits, should_stop=stop_after(2))
    other = make_net()
    other.head.bias.data[0] += 1e-3
    with pytest.raises(OutputError, match="another model file"):
        go(tmp_path, make_recipe(), splits, resume=True, model=other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"limit": 229}, r"training images: 230 images there, 229 images here"),
        ({"label": 3}, r"training images: 230 images, but not the same"),
        ({"pixel": 3}, r"training images: 230 images, but not the same"),
    ],
)
@pytest.mark.thorough
def test_resume_with_other_data_is_refused(tmp_path, splits, monkeypatch, change, said):
    with pytest.raises(Interrupted):
        go(tmp_path, make_recipe(), splits, should_stop=stop_after(2))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    train, test = read_digits()
    if "label" in change:
        train.labels[:] = train.labels.roll(1)
    if "pixel" in change:
        train.pixels[:, 0, 0, 0] += 1
    monkeypatch.setattr("dpm_cli.data.digits.read_digits", lambda: (train, test))
    changed = load_digits(**{key: value for key, value in change.items() if key == "limit"})
    with pytest.raises(OutputError, match=rf"made with other data \({said}\): resume with the same") as refusal:
        go(tmp_path, make_recipe(), changed, resume=True)
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.thorough
def test_export_that_fails_costs_no_training(tmp_path, splits, whole, monkeypatch):
    def fail(*args, **settings):
        raise RunError("model.onnx was not written: an operator is not supported")

    monkeypatch.setattr("dpm_cli.run.delivery.export_one", fail)
    with pytest.raises(RunError, match=r"not supported; the training is kept: --resume with --set export=\[\]"):
        go(tmp_path, make_recipe("export=[onnx]"), splits)
    _, events, _ = go(tmp_path, make_recipe(), splits, resume=True)
    assert events[1].stage == "export"
    assert not any(event.kind == "step" for event in events)
    assert_same_bits(tensors_of(tmp_path), tensors_of(whole("plain")))


@pytest.mark.thorough
def test_what_a_format_cannot_hold_costs_only_that_file(tmp_path, splits, monkeypatch):
    def export_one(slim, image, format, *args, **settings):
        if format == "torchscript":
            raise FormatError("model.ts was not written: TorchScript cannot hold Clamp")
        return really(slim, image, format, *args, **settings)

    really = delivery.export_one
    monkeypatch.setattr(delivery, "export_one", export_one)
    _, _, report = go(tmp_path, make_recipe("export=[torchscript,onnx]"), splits)
    assert [made.format for made in report.exports] == ["onnx"]
    assert "model.ts was not written: TorchScript cannot hold Clamp" in report.notes
    assert (tmp_path / "slim.pt").exists()


@pytest.mark.thorough
def test_gradient_scaler_is_restored(tmp_path, splits):
    def scaled():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        return {"precision": dataclasses.replace(FP32, scaler=scaler), "model": model}

    model, folders = make_net(), [tmp_path / "whole", tmp_path / "stopped"]
    model.head.weight.data *= 200  # large gradients, which overflow at the largest scales
    for folder in folders:
        folder.mkdir()
    recipe = make_recipe("prune.end=0.6", "train.epochs=5", "train.lr=0.0001", "finetune.lr=0.0001")
    go(folders[0], recipe, splits, **scaled())
    with pytest.raises(Interrupted):
        go(folders[1], recipe, splits, **scaled(), should_stop=stop_after(16))
    assert 0 < checkpoint_in(folders[1]).state["scaler"]["scale"] < 2.0**127  # some steps were skipped
    go(folders[1], recipe, splits, **scaled(), resume=True)
    assert_same_bits(tensors_of(folders[1]), tensors_of(folders[0]))
    (first, *_) = [event for event in metrics(folders[0]) if event["event"] == "compact"]
    assert first["step"] > 4  # skipped steps did not count as steps of the decay


# ---------------------------------------------------------------------------------------------------- accuracy floor

FLOOR = ["prune.max_drop=10"]


@pytest.fixture
def accuracy(monkeypatch):
    """Let the validation accuracy be a function of the run: 90 % of the dense model, and what the test says."""

    running, begin = [], Run.events

    def events(run, **settings):
        running.append(run)
        return begin(run, **settings)

    def obey(rule):
        monkeypatch.setattr(Run, "events", events)
        monkeypatch.setattr(Setup, "validate", lambda setup, model: 90.0 if rule(running[-1]) else 50.0)

    return obey


def units_after_rounds(folder):
    return [event["units"] for event in metrics(folder) if event["event"] == "compact"]


def go_and_break(output, recipe, splits, **settings):
    _, events, report = go(output, recipe, splits, **settings)
    assert report.floor.is_broken
    assert report == Report.from_json((Path(output) / "report.json").read_text())
    assert "\n" not in report.floor.text
    return report, events


def test_floor_that_holds_changes_no_bit(tmp_path, splits, whole):
    _, events, report = go(tmp_path, make_recipe("prune.max_drop=100"), splits)
    assert_same_bits(tensors_of(tmp_path), tensors_of(whole("plain")))
    assert not any(event.kind == "back" for event in events)
    floor = report.floor
    assert (floor.max_drop, floor.limit, floor.is_broken, floor.text) == (100, floor.dense - 100, False, None)


@pytest.mark.thorough
def test_last_round_that_breaks_the_floor_is_taken_back(tmp_path, splits, whole, accuracy):
    first, _ = units_after_rounds(whole("plain"))
    accuracy(lambda run: run.subject.pruning.groups.units >= first)
    report, events = go_and_break(tmp_path, make_recipe(*FLOOR), splits)
    (back,) = [event for event in metrics(tmp_path) if event["event"] == "back"]
    assert (back["culprit"], back["units"], back["validation_accuracy"], back["floor"]) == ("round 2", first, 50, 80)
    assert report.units.removed == 20 - first
    assert report.target.reached == back["macs"] > report.target.limit
    assert not report.target.is_met
    assert (report.floor.dense, report.floor.is_broken) == (90, True)
    assert report.floor.text in report.notes
    assert f"with macs {back['macs']:,} (target macs <= {report.target.limit:,})" in report.floor.text
    slim = load_slim(tmp_path / "slim.pt", model=make_net()).module
    assert slim.stem.out_channels + slim.inner.out_channels == first
    stages = [event.name for event in events if event.kind == "stage"]
    assert stages == ["train", "finetune", "finetune"]  # what was held is fine-tuned, too
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl", "model.json", "recipe.yaml", "report.json", "slim.pt",
    ]  # fmt: skip


def test_round_that_does_not_recover_until_the_next_ends_the_pruning(tmp_path, splits, accuracy):
    accuracy(lambda run: run.subject.pruning.groups.units == 20)
    report, events = go_and_break(tmp_path, make_recipe(*FLOOR), splits)
    rounds = [event.round for event in events if event.kind == "round"]
    assert rounds == [1]
    assert report.units.removed == 0
    assert report.target.reached == report.target.dense
    (back,) = [event for event in events if event.kind == "back"]
    assert (back.culprit, back.stage) == ("round 1", "train")
    assert [event.step for event in events if event.kind == "step"][-6:] == [1, 2, 3, 4, 5, 6]  # fine-tuning


def test_round_that_recovers_in_time_stays(tmp_path, splits, whole, accuracy):
    run, steps = make_run(tmp_path, make_recipe(*FLOOR), splits), []
    pruning, second = run.subject.pruning, run.subject.pruning.rounds.starts[1]
    accuracy(lambda run: not (pruning.round == 1 and len(steps) < second))
    follow(run.events(), lambda event: steps.append(event) if event.kind == "step" else None)
    assert run.subject.pruning is pruning
    assert_same_bits(tensors_of(tmp_path), tensors_of(whole("plain")))


def test_training_that_never_holds_leaves_the_model_as_it_was(tmp_path, splits, accuracy):
    accuracy(lambda run: not run.floor.dense)
    report, _ = go_and_break(tmp_path, make_recipe(*FLOOR), splits)
    assert report.units.removed == 0
    assert_same_bits(tensors_of(tmp_path), make_net().state_dict())


@pytest.mark.thorough
def test_fine_tuning_that_breaks_the_floor_is_taken_back_and_the_target_is_met(tmp_path, splits, whole, accuracy):
    accuracy(lambda run: run.course.stage == 0)
    _, _, report = go(tmp_path, make_recipe(*FLOOR), splits)
    assert report.target.is_met
    assert not report.floor.is_broken
    assert "fine-tuning broke the accuracy floor" in report.notes[0]
    without = tmp_path / "without"
    without.mkdir()
    go(without, make_recipe("finetune.epochs=0", "recalibrate_batches=0"), splits)
    assert_same_bits(tensors_of(tmp_path), tensors_of(without))


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("variant", ["otov2", "gate-decorator", "fixed ticks"])
@pytest.mark.thorough
def test_going_back_prunes_no_more_and_leaves_a_plain_model(tmp_path, splits, accuracy, variant, epochs):
    accuracy(lambda run: run.subject.pruning.groups.units == 20)
    recipe = make_recipe(*VARIANTS[variant], *FLOOR, f"finetune.epochs={epochs}")
    report, events = go_and_break(tmp_path, recipe, splits)
    (back,) = [place for place, event in enumerate(events) if event.kind == "back"]
    later = [getattr(event, "name", None) for event in events[back:] if event.kind in ("round", "stage")]
    assert later == ["finetune"] * epochs
    assert report.units.removed == 0
    assert tensors_of(tmp_path).keys() == make_net().state_dict().keys()


@pytest.mark.parametrize("variant", often(["plain", "rectify", "otov2", "gate-decorator"], "plain"))
@pytest.mark.thorough
def test_stopped_run_breaks_its_floor_with_the_same_bits(tmp_path, splits, whole, accuracy, variant):
    recipe = make_recipe(*VARIANTS[variant], *FLOOR)
    first, *_ = units_after_rounds(whole(variant))
    accuracy(lambda run: run.subject.pruning.groups.units >= first)
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        folder.mkdir()
    go_and_break(folders[0], recipe, splits)
    resume_to_the_end(folders[1], recipe, splits, lambda attempt: stop_after(1 + attempt % 5))
    assert_same_bits(*(tensors_of(folder) for folder in folders))
    assert timeless(metrics(folders[0])) == timeless(metrics(folders[1]))


# ------------------------------------------------------------------------------------------------------------ faults


def test_diverging_training_stops_with_the_step_and_the_way_out(tmp_path, splits):
    recipe = make_recipe("train.lr=10", "train.momentum=0.99", "train.epochs=30", "checkpoint.every=1")
    model = make_net()
    model.norm = nn.Identity()
    model.inner_norm = nn.Identity()
    with pytest.raises(RunError, match=r"not finite in stage train (at|before) step \d+: lower train.lr") as error:
        go(tmp_path, recipe, splits, model=model)
    assert "\n" not in str(error.value)
    kept = checkpoint_in(tmp_path)
    if kept:
        assert str(tmp_path / "checkpoint.pt") in str(error.value)
        assert all(tensor.isfinite().all() for tensor in kept.state["parts"]["trainee"]["model"].values())
    else:
        assert "no checkpoint was written yet" in str(error.value)


class Spoiled:
    """A split whose n-th training batch holds a NaN."""

    def __init__(self, split, bad):
        self.split, self.bad, self.seen = split, bad, 0

    def __len__(self):
        return len(self.split)

    def batches(self, *args, **settings):
        for images, labels in self.split.batches(*args, **settings):
            if settings.get("augment") and self.seen == self.bad:
                images = images.clone()
                images[3, 0, 2, 2] = float("nan")
            self.seen += bool(settings.get("augment"))
            yield images, labels


def test_not_a_number_in_a_batch_names_its_step_and_the_good_checkpoint(tmp_path, splits):
    spoiled = dataclasses.replace(splits, train=Spoiled(splits.train, 8))
    with pytest.raises(RunError, match=r"stage train at step 8: .*last good checkpoint is .*checkpoint.pt"):
        go(tmp_path, make_recipe("checkpoint.every=3"), spoiled)
    assert checkpoint_in(tmp_path).state["step"] == 6
    go(tmp_path, make_recipe("checkpoint.every=3"), splits, resume=True)
    assert (tmp_path / "report.json").exists()


def test_not_a_number_in_a_round_is_not_blamed_on_the_removal(tmp_path, splits):
    spoiled = dataclasses.replace(splits, train=Spoiled(splits.train, 2))
    with pytest.raises(RunError, match="not finite in stage train at step 2"):
        go(tmp_path, make_recipe("checkpoint.every=100"), spoiled)


def test_optimizer_that_remembers_infinity_is_never_saved(tmp_path, splits):
    recipe = make_recipe("checkpoint.every=4", "train.optimizer=adamw", "train.lr=0.001")
    run = make_run(tmp_path, recipe, splits)
    events = run.events()
    while getattr(next(events), "step", None) != 3:
        pass
    model = run.subject.model
    model.head.bias.register_hook(lambda gradient: gradient + 1e22)  # its square overflows, so Adam's step is 0
    with pytest.raises(RunError, match="not finite in stage train before step 4"):
        list(events)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert checkpoint_in(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("prune.target.macs=0.0001", TargetError, "cannot be met: between"),
        ("prune.target.macs=10G", TargetError, "keeps everything"),
        ("decay.steps=100", RecipeError, "do not fit"),
        ("prune.keep=[nothing]", RecipeError, "matches no layer"),
        ("prune.base=otov2 prune.end=0.9", RecipeError, "8 steps must follow for what is missing then"),
        ("prune.base=otov2 decay.steps=1 prune.end=1.0", RecipeError, "1 steps must follow"),
        ("prune.base=gate-decorator decay.steps=7", RecipeError, "do not fit into a tick of 6 steps"),
        ("prune.base=gate-decorator prune.gates.fraction=0.1 train.epochs=1", RecipeError, "no room for two times 4"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, splits, change, error, message):
    with pytest.raises(error, match=message):
        make_run(tmp_path, make_recipe(*change.split()), splits)
    assert not any(tmp_path.iterdir())


def test_missed_target_is_said_at_the_end_and_nothing_is_written_as_if_it_were_met(tmp_path, splits):
    run = make_run(tmp_path, make_recipe("finetune.epochs=0"), splits)
    events = run.events()
    next(events)
    pruning = run.subject.pruning
    pruning.rounds = dataclasses.replace(pruning.rounds, starts=(0, 17))  # the second round cannot end in time
    with pytest.raises(TargetError, match=r"was not met: [\d,]+ is left"):
        list(events)
    assert not (tmp_path / "slim.pt").exists()
    assert not (tmp_path / "report.json").exists()


def test_metrics_that_cannot_be_written_are_one_line(tmp_path, splits):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics.jsonl cannot be written: Is a directory"):
        go(tmp_path, make_recipe(), splits)


def ended(epoch):
    return EpochEnded("train", epoch, 9, 6 * epoch, 1.5, None, 0.1, 1000.0, 0.0, 0.5)


def test_metrics_are_cut_back_to_the_checkpoint_but_never_lengthened(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    with journal.opened():
        journal.write(ended(1))
        size = journal.flush_to_disk()
        journal.write(ended(2))
    journal = Journal(path)
    journal.bytes = size
    with journal.opened():
        journal.write(ended(3))
    assert [line["epoch"] for line in metrics(tmp_path)] == [1, 3]
    path.unlink()
    journal.bytes = 10_000
    with journal.opened():
        journal.write(ended(4))
    assert [line["epoch"] for line in metrics(tmp_path)] == [4]


def test_only_what_tells_of_the_model_is_in_the_metrics_and_without_a_path_nothing(tmp_path):
    for path in (tmp_path / "metrics.jsonl", None):
        journal = Journal(path)
        with journal.opened():
            journal.write(Note("2 images were left out"))
            journal.write(ended(1))
    assert metrics(tmp_path) == [ended(1).to_dict()]
    assert len(list(tmp_path.iterdir())) == 1

import copy
import json
from functools import partial

import pytest
import torch
import yaml
from torch import nn

import dpm_cli
from dpm_cli.errors import Interrupted, RecipeError
from dpm_cli.export import open_exported
from dpm_cli.measure import measure_in_turns
from dpm_cli.models import build, load
from dpm_cli.recipe import Training, dump_recipe, load_recipe, parse_recipe
from dpm_cli.recipe.sections import Prune
from dpm_cli.report import Report
from dpm_cli.results import PlannedTarget
from dpm_cli.run.sparse_story import SphereStage
from dpm_cli.sparse.on_the_fly import SphereTraining, cut_, find_sparse_layers, measure_sparsity


@pytest.fixture(autouse=True)
def _short_latencies(monkeypatch):
    monkeypatch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))


def recipe(*overrides):
    values = {
        "model": {"arch": "digits", "classes": 10, "input": [1, 8, 8]},
        "data": {"name": "digits", "batch": 32, "limit": 200, "augment": {"crop": 1, "flip": False}},
        "prune": {"base": "on-the-fly", "target": {"sparsity": [0.5, 0.9]}},
        "train": {"epochs": 2},
        "finetune": {"epochs": 0},
        "export": [],
        "precision": "fp32",
        "recalibrate_batches": 2,
        "checkpoint": {"every": 3},
    }
    return parse_recipe(values, overrides)


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    module = build("digits", classes=10, shape=(1, 8, 8))
    module(torch.randn(64, 1, 8, 8))
    return module.eval()


def put_on_spheres(model, *, epochs=4, **changes):
    settings = {"penalty": "ternary-cosine", "strength": 1.0, "per": "filter", "keep_first": True} | changes
    prune = Prune(base="on-the-fly", target={"sparsity": 0.5}, on_the_fly=settings)
    return SphereTraining(model, prune, Training(epochs=epochs))


# ------------------------------------------------------------------------------------------------------------- layers


def test_the_first_convolution_and_what_the_recipe_keeps_are_spared(dense):
    layers = find_sparse_layers(dense, (), keep_first=False)
    assert layers[0] == "conv1"
    assert layers[-1] == "linear"
    assert find_sparse_layers(dense, (), keep_first=True) == layers[1:]
    assert find_sparse_layers(dense, ("block1", "lin*"), keep_first=True) == [
        layer for layer in layers[1:] if layer.startswith("block2")
    ]


def test_weights_that_layers_share_are_spared():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[2].weight = net[1].weight
    assert find_sparse_layers(net, (), keep_first=True) == ["3"]


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_a_cut_reaches_the_sparsity_in_every_layer_and_touches_no_other(dense, sparsity):
    net = copy.deepcopy(dense)
    layers = find_sparse_layers(net, (), keep_first=True)
    masks = cut_(net, layers, sparsity=sparsity, threshold=None, how="none", per="filter")
    for name, tensor in net.state_dict().items():
        if name in masks:
            zeros = int((tensor == 0).sum())
            assert abs(zeros - sparsity * tensor.numel()) <= 1
        else:
            assert torch.equal(tensor, dense.state_dict()[name])
    assert measure_sparsity(masks) == pytest.approx(sparsity, abs=1e-2)


def test_a_threshold_cuts_more_where_more_is_small(dense):
    masks = cut_(copy.deepcopy(dense), ["linear"], sparsity=0.5, threshold=0.5, how="none", per="filter")
    higher = cut_(copy.deepcopy(dense), ["linear"], sparsity=0.5, threshold=1.0, how="none", per="filter")
    assert 0 < measure_sparsity(masks) < measure_sparsity(higher) < 1


# ------------------------------------------------------------------------------------------------------------ training


def test_a_model_on_spheres_and_off_them_is_the_same_plain_model(dense):
    net = copy.deepcopy(dense)
    images = torch.randn(4, 1, 8, 8)
    training = put_on_spheres(net)
    assert torch.allclose(net(images), dense(images), atol=1e-5)
    training.unwrap_(net)
    assert net.state_dict().keys() == dense.state_dict().keys()
    assert torch.allclose(net(images), dense(images), atol=1e-5)


@pytest.mark.parametrize("penalty", ["ternary-cosine", "tail-energy"])
@pytest.mark.parametrize("per", ["filter", "layer"])
def test_the_penalty_alone_makes_half_of_the_weights_small(dense, penalty, per):
    net = copy.deepcopy(dense)
    training = put_on_spheres(net, penalty=penalty, per=per, strength=30.0)
    training.epoch = 4  # the ramps are over
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = training.value(0.5).item()
    for _ in range(30):
        optimizer.zero_grad()
        training.penalise_()
        optimizer.step()
    assert training.value(0.5).item() < 0.5 * before


def test_the_penalty_waits_for_its_ramp(dense):
    net = copy.deepcopy(dense)
    training = put_on_spheres(net, epochs=10)
    stage = SphereStage(None, training)
    stage.before_step_()
    assert all(weight.grad is None for weight in training.weights)
    for _ in range(3):
        assert not list(stage.end_epoch(None))
    stage.before_step_()
    assert all(weight.grad.abs().sum() > 0 for weight in training.weights)


# -------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.thorough
def test_one_training_serves_every_sparsity(tmp_path, dense):
    report = dpm_cli.prune(dense, recipe("export=[onnx, torchscript]"), output=tmp_path)
    rows = report.sparsities
    assert [row.asked for row in rows] == [0.5, 0.9]
    assert [row.reached for row in rows] == pytest.approx([0.5, 0.9], abs=1e-2)
    assert rows[0].dense == rows[1].dense
    assert rows[1].bytes < 0.5 * rows[0].bytes < 0.5 * report.dense.bytes
    assert report.slim.bytes == rows[0].bytes
    assert (report.target.kind, report.target.is_met) == ("sparsity", True)
    assert any("dense kernels" in note for note in report.notes)
    assert Report.from_json((tmp_path / "report.json").read_text()) == report

    files = [tmp_path / "slim.pt", tmp_path / "slim-0.9.pt"]
    assert [row.file for row in rows] == [str(file) for file in files]
    assert files[1].stat().st_size < files[0].stat().st_size
    for file, row in zip(files, rows):
        module = load(file)
        assert type(module.linear) is nn.Linear
        assert dpm_cli.evaluate(file, recipe(), latency=False).accuracy == row.recalibrated
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        expected = load(files[0])(images)
    for name in ("model.onnx", "model.ts"):
        assert torch.allclose(open_exported(tmp_path / name)(images), expected, atol=1e-5)


@pytest.mark.thorough
def test_what_recovery_wins_is_told_apart_from_batchnorm(tmp_path, dense):
    report = dpm_cli.prune(dense, recipe("recalibrate_batches=0", "prune.on_the_fly.recover=none"), output=tmp_path)
    for row in report.sparsities:
        assert row.recalibrated is None
        assert row.recovered == row.cut


@pytest.mark.thorough
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, dense):
    dpm_cli.prune(dense, recipe(), output=tmp_path / "whole")
    steps = iter(range(100))
    with pytest.raises(Interrupted):
        dpm_cli.prune(dense, recipe(), output=tmp_path / "parts", should_stop=lambda: next(steps) == 7)
    dpm_cli.prune(dense, recipe(), output=tmp_path / "parts", resume=True)
    whole, parts = (load(tmp_path / name / "slim.pt").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_weights_can_be_cut_without_training_and_without_labels(tmp_path, dense):
    report = dpm_cli.prune(dense, recipe("train.epochs=0", "data.labels=false"), output=tmp_path)
    assert report.target.is_met
    assert {row.cut for row in report.sparsities} == {None}
    layers = find_sparse_layers(dense, (), keep_first=True)
    expected = copy.deepcopy(dense)
    cut_(expected, layers, sparsity=0.5, threshold=None, how=recipe().prune.on_the_fly.recover, per="filter")
    assert torch.allclose(load(tmp_path / "slim.pt").linear.weight, expected.linear.weight, atol=1e-6)


@pytest.mark.thorough
def test_another_counter_is_named_in_the_report(tmp_path, dense):
    report = dpm_cli.prune(dense, recipe("train.epochs=0", "counter=thop"), output=tmp_path)
    assert any(note.startswith("MACs are counted by thop") for note in report.notes)


@pytest.mark.thorough
def test_events_tell_every_cut(tmp_path, dense):
    dpm_cli.prune(dense, recipe(), output=tmp_path)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["asked"] for event in events if event["event"] == "cut"] == [0.5, 0.9]


def test_the_plan_names_the_sparsity(dense):
    plan = dpm_cli.inspect(dense, recipe())
    assert plan.groups == ()
    weights = sum(dense.get_submodule(name).weight.numel() for name in find_sparse_layers(dense, (), keep_first=True))
    assert plan.target == PlannedTarget("sparsity", 0.5, weights / 2, is_achievable=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.target.macs=0.5", "the others units"),
        ("prune.base=depgraph", "the others units"),
        ("finetune.epochs=1", "set finetune.epochs: 0"),
        ("prune.max_drop=1", r"neither prune\.max_drop"),
        ("compact.fold_mean=true", r"compact\.fold_mean"),
        ("prune.target.sparsity=1.5", "less than 1"),
        ("prune.target.sparsity=[]", "at least 1"),
    ],
)
def test_settings_that_do_not_belong_together_are_explained(override, message):
    with pytest.raises(RecipeError, match=message):
        recipe(override)


def test_the_recipe_dumps_its_sparsities():
    wanted = recipe("prune.target.sparsity=0.7")
    assert wanted.prune.target.sparsity == (0.7,)
    assert dump_recipe(parse_recipe(yaml.safe_load(dump_recipe(wanted)))) == dump_recipe(wanted)


@pytest.mark.slow
def test_the_shipped_recipe_cuts_half_of_the_weights_at_no_cost(tmp_path):
    settings = load_recipe("on-the-fly")
    dpm_cli.train(settings, output=tmp_path / "dense.pt")
    report = dpm_cli.prune(tmp_path / "dense.pt", settings, output=tmp_path / "out")
    half = report.sparsities[0]
    assert half.reached == pytest.approx(0.5, abs=0.01)
    assert half.recalibrated >= half.dense - 1
    assert half.bytes < 0.7 * report.dense.bytes

"""Results as JSON keep their keys and the order of these, which scripts rely on."""

import json
from dataclasses import replace

from dpm_cli.report import KeptLayer, Milliseconds, Width
from dpm_cli.results import (
    BatchMilliseconds,
    Evaluated,
    GroupSensitivity,
    Inspected,
    PlannedGroup,
    PlannedTarget,
    Sensitivity,
    Trained,
)

EVALUATED = Evaluated("slim.pt", "slim", bytes=1, accuracy=90.0, loss=0.5, images=2, unreadable=0)
PLAN = Inspected(
    arch=None,
    dense={"macs": 20, "params": 10, "channels": 4},
    lowest={"macs": 5, "params": 3, "channels": 1},
    round_to=1,
    target=PlannedTarget("macs", 0.1, 2, is_achievable=False),
    groups=(PlannedGroup("conv", ("conv", "skip"), units=4, lowest=1),),
    kept=(KeptLayer("linear", "output"),),
)


def test_a_training_is_flat():
    trained = Trained("m.pt", "digits", 90.0, 0.5, None, 3, 10, 40, 1.5, 0, "cpu", "fp32")
    keys = "path arch accuracy loss validation_accuracy epochs params bytes seconds seed device precision"
    assert list(trained.to_dict()) == keys.split()


def test_an_exported_file_has_neither_costs_nor_widths():
    keys = "file macs params kind bytes accuracy loss images unreadable latency"
    assert list(EVALUATED.to_dict()) == keys.split()


def test_weights_tell_their_odd_widths_even_without_any():
    latency = {"torch": Milliseconds(2.0, 1.0, 3.0)}
    batches = {"torch": BatchMilliseconds(4.0, 3.0, 5.0, batch=8)}
    found = replace(EVALUATED, macs=7, params=8, odd_widths={}, latency=latency, latency_in_batches=batches).to_dict()
    keys = "file macs params kind bytes odd_widths accuracy loss images unreadable latency latency_in_batches"
    assert list(found) == keys.split()
    told = '{"torch": {"median": 4.0, "low": 3.0, "high": 5.0, "threads": null, "doubt": null, "batch": 8}}'
    assert json.dumps(found["latency_in_batches"]) == told


def test_a_target_that_cannot_be_met_leaves_out_what_would_be_planned():
    assert PLAN.to_dict() == {
        "arch": None,
        "code": {},
        "run": None,
        "problems": [],
        "dense": {"macs": 20, "params": 10, "channels": 4},
        "round_to": 1,
        "achievable": {"macs": [5, 20], "params": [3, 10], "channels": [1, 4]},
        "target": {"kind": "macs", "asked": 0.1, "limit": 2, "achievable": False},
        "groups": [{"name": "conv", "layers": ["conv", "skip"], "units": 4, "lowest": 1}],
        "kept": [{"layer": "linear", "reason": "output", "macs": 0}],
    }


def test_a_full_plan_ends_with_widths_and_sensitivity():
    rows = (GroupSensitivity("conv", ("conv", "skip"), 4, 2, accuracy=80.0, loss=1.0, macs_saved=0.25),)
    plan = replace(
        PLAN,
        groups=(replace(PLAN.groups[0], planned=2),),
        planned={"macs": 10, "params": 5, "channels": 2},
        widths=(Width("conv", 4, 2),),
        sensitivity=Sensitivity(0.5, "train", 9, accuracy=90.0, loss=0.5, groups=rows),
    )
    found = plan.to_dict()
    assert list(found) == [*PLAN.to_dict(), "planned", "widths", "sensitivity"]
    assert list(found["groups"][0]) == ["name", "layers", "units", "lowest", "planned"]
    assert found["widths"] == [{"layer": "conv", "before": 4, "after": 2}]
    assert list(found["sensitivity"]) == ["share", "split", "images", "accuracy", "loss", "groups"]
    assert list(found["sensitivity"]["groups"][0]) == list(
        "group layers units removed accuracy loss macs_saved".split()
    )
    assert json.loads(json.dumps(found)) == found

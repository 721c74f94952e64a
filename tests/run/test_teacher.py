"""A dense model that only guesses does not teach, and the run says so before it trains."""

import pytest
import torch
from digits_recipe import recipe

import dpm_cli
from dpm_cli.errors import Interrupted
from dpm_cli.models import build

NOTE = "the dense model guesses"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("untrained") / "model.pt"
    torch.save(build("digits", classes=10, shape=[1, 8, 8]).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "model.pt"
    dpm_cli.train(recipe(data={"limit": None}, train={"epochs": 1, "lr": 0.1}), output=path)
    return path


def prune(model, output, *, limit=600, **training):
    """The events, the report and the weights of a short run."""
    events = []
    settings = recipe(data={"limit": limit, "validation": 0.2}, train={"epochs": 2} | training)
    report = dpm_cli.prune(model, settings, output=output, on_event=events.append)
    return events, report, dpm_cli.load(output / "slim.pt").state_dict()


def test_it_learns_from_labels_as_if_there_was_no_teacher(untrained, tmp_path):
    events, report, weights = prune(untrained, tmp_path / "default")
    _, alone, expected = prune(untrained, tmp_path / "alone", distill=0)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    (note,) = [note for note in report.notes if note.startswith(NOTE)]
    assert "of 120 validation images, in 10 classes" in note
    assert not any("its teacher" in note for note in report.notes)
    assert not any(note.startswith(NOTE) for note in alone.notes)
    told = [event.kind for event in events if event.kind == "stage" or getattr(event, "text", "") == note]
    assert told == ["note", "stage"]


def test_a_model_that_knows_something_teaches(trained, tmp_path):
    _, report, weights = prune(trained, tmp_path / "default")
    _, _, alone = prune(trained, tmp_path / "alone", distill=0)
    assert not any(note.startswith(NOTE) for note in report.notes)
    assert any(not torch.equal(weights[name], tensor) for name, tensor in alone.items())


def test_too_few_images_condemn_no_teacher(untrained, tmp_path):
    _, report, weights = prune(untrained, tmp_path / "default", limit=100)  # 20 of them for validation
    _, _, alone = prune(untrained, tmp_path / "alone", limit=100, distill=0)
    assert not any(note.startswith(NOTE) for note in report.notes)
    assert any(not torch.equal(weights[name], tensor) for name, tensor in alone.items())


def test_it_is_let_go_again_after_an_interruption(untrained, tmp_path):
    settings = recipe(data={"limit": 600, "validation": 0.2}, checkpoint={"every": 5})
    steps = iter(range(9))
    with pytest.raises(Interrupted):
        dpm_cli.prune(untrained, settings, output=tmp_path / "cut", should_stop=lambda: next(steps, 8) == 8)
    report = dpm_cli.prune(untrained, settings, output=tmp_path / "cut", resume=True)
    whole = dpm_cli.prune(untrained, settings, output=tmp_path / "whole")
    assert report.notes == whole.notes
    resumed, expected = (dpm_cli.load(tmp_path / name / "slim.pt").state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_on_the_fly_too(untrained, tmp_path):
    settings = recipe(data={"limit": 600, "validation": 0.2})
    settings["prune"] = {"base": "on-the-fly", "target": {"sparsity": [0.5]}}
    report = dpm_cli.prune(untrained, settings, output=tmp_path / "out")
    assert any(note.startswith(NOTE) for note in report.notes)

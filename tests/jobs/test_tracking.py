"""A run is logged to TensorBoard and MLflow, in stores of its own folder."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dpm_cli.errors import RecipeError
from dpm_cli.events import EpochEnded, Event, Note, Resumed, UnitsRemoved, UnitsWatched
from dpm_cli.jobs.tracking import tracking
from dpm_cli.recipe import parse_recipe

EVENTS: list[Event] = [
    UnitsWatched("train", 2, 1, 5, 0, 1, 3, {}, ()),
    EpochEnded("train", 1, 1, 4, 0.5, 91.0, 0.05, 100.0, 0.0, 1.0),
    UnitsRemoved("train", 1, 4, 8, 0, 1000, 100, 12, 0.0),
    Note("nothing to draw"),
    EpochEnded("finetune", 1, 1, 4, 0.25, None, 0.01, 100.0, 0.0, 1.0),
]
LOSSES = [(4, 0.5), (8, 0.25)]


def log(kind: str, folder: Path, events: Sequence[Event] = EVENTS) -> list[Event]:
    told: list[Event] = []
    smallest = {"model": {"arch": "digits"}, "data": {"name": "digits"}, "prune": {"target": {"macs": 0.5}}}
    with tracking(parse_recipe(smallest | {"track": [kind]}), folder, told.append) as tell:
        for event in events:
            tell(event)
    return told


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert log("tensorboard", tmp_path) == EVENTS
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in read.Scalars("train/loss")] == LOSSES
    assert {"units/decaying", "model/macs", "validation/accuracy"} <= set(read.Tags()["scalars"])


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    class Memory:
        def log(self, values: Mapping[str, float], step: int) -> None:
            steps.append(step)

        def describe(self, recipe: str) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("dpm_cli.jobs.tracking.make_tracker", lambda kind, folder: Memory())
    log("tensorboard", tmp_path, [Resumed("finetune", 2, "checkpoint.pt", before=4), EVENTS[-1], EVENTS[-1]])
    assert steps == [8, 12]


@pytest.mark.slow  # making its tables takes seconds
@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    assert log("mlflow", tmp_path) == EVENTS
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("dpm").experiment_id])
    assert run.info.status == "FINISHED"
    assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "train/loss")] == LOSSES
    assert "seed: 0" in run.data.tags["mlflow.note.content"]


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
def test_a_store_that_is_not_installed_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorboard", "torch.utils.tensorboard", "mlflow", "mlflow.tracking"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=rf"pip install 'dpm-cli\[{kind}\]'"):
        log(kind, tmp_path)

"""Log a run to local stores of other tools too: TensorBoard and MLflow, each an extra of the package."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, assert_never

from dpm_cli.display.history import Axis
from dpm_cli.errors import RecipeError
from dpm_cli.events import EpochEnded, Event, Resumed, RoundStarted, UnitsRemoved, UnitsWatched
from dpm_cli.recipe import Recipe, dump_recipe

FOLDERS = {"tensorboard": "tensorboard", "mlflow": "mlflow.db"}  # inside the folder of the run


class Tracker(Protocol):
    """Is a store that takes numbers by name and step, and one text."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def describe(self, recipe: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes event files: `tensorboard --logdir out` shows them."""

    def __init__(self, folder: Path) -> None:
        with _needs("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer: Any = SummaryWriter(str(folder / FOLDERS["tensorboard"]))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def describe(self, recipe: str) -> None:
        self._writer.add_text("recipe", f"```yaml\n{recipe}\n```")

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """Writes an SQLite store: `mlflow ui --backend-store-uri sqlite:///out/mlflow.db` shows it."""

    def __init__(self, folder: Path) -> None:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they tell how they make their tables
        with _needs("mlflow"):
            import sqlalchemy  # noqa: F401  # MLflow imports it late, in the middle of a traceback
            from mlflow.tracking import MlflowClient
        folder = folder.resolve()
        self._client: Any = MlflowClient(tracking_uri=f"sqlite:///{folder / FOLDERS['mlflow']}")
        known = self._client.get_experiment_by_name("dpm")
        artifacts = (folder / "mlruns").as_uri()
        experiment = known.experiment_id if known else self._client.create_experiment("dpm", artifacts)
        unfinished = self._client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=1)
        self._run = (unfinished[0] if unfinished else self._client.create_run(experiment, run_name=folder.name)).info
        self._is_new = not unfinished  # a resumed run goes on in its own

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run.run_id, name, value, step=step)

    def describe(self, recipe: str) -> None:
        if self._is_new:
            self._client.set_tag(self._run.run_id, "mlflow.note.content", recipe[:5000])

    def close(self) -> None:
        self._client.set_terminated(self._run.run_id)


def make_tracker(kind: str, folder: Path) -> Tracker:
    """Open a store in the folder of a run. Raises RecipeError if its package is not installed."""
    match kind:
        case "tensorboard":
            return TensorBoard(folder)
        case "mlflow":
            return MLflow(folder)
        case _:
            raise RecipeError(f"track is {kind!r}; known: {', '.join(FOLDERS)}")


@contextlib.contextmanager
def tracking(recipe: Recipe, folder: Path, on_event: Callable[[Event], None]) -> Iterator[Callable[[Event], None]]:
    """Yield a function that logs events and passes them on. Raises RecipeError before anything is done."""
    if not recipe.track:
        yield on_event
        return
    with warnings.catch_warnings(action="ignore"):  # about the insides of other people's stores
        trackers = [make_tracker(kind, folder) for kind in recipe.track]
        for tracker in trackers:
            tracker.describe(dump_recipe(recipe))
        yield _Logger(trackers, on_event).tell
        for tracker in trackers:  # an interrupted run stays open, and goes on here
            tracker.close()


class _Logger:
    """Passes events on, and logs their numbers over the steps of all stages."""

    def __init__(self, trackers: Sequence[Tracker], on_event: Callable[[Event], None]) -> None:
        self._trackers, self._on_event, self._axis = trackers, on_event, Axis()

    def tell(self, event: Event) -> None:
        self._on_event(event)
        match event:
            case Resumed():
                self._axis.resume(event)
            case EpochEnded() | UnitsWatched() | RoundStarted() | UnitsRemoved():
                at = self._axis.place(event.stage, event.step, ends_epoch=isinstance(event, EpochEnded))
                for tracker in self._trackers:
                    tracker.log(read_values(event), at)


def read_values(event: EpochEnded | UnitsWatched | RoundStarted | UnitsRemoved) -> dict[str, float]:
    """Return the numbers of an event that stores can draw over the steps."""
    match event:
        case EpochEnded(loss=loss, validation_accuracy=accuracy, lr=lr, images_per_second=speed):
            scored = {} if accuracy is None else {"validation/accuracy": accuracy}
            return {"train/loss": loss, "train/lr": lr, "train/images_per_second": speed} | scored
        case UnitsWatched(decaying=decaying, released=released, removed=removed):
            return {"units/decaying": decaying, "units/released": released, "units/removed": removed}
        case RoundStarted(chosen=chosen):
            return {"units/chosen": chosen}
        case UnitsRemoved(macs=macs, params=params, units=units):
            return {"model/macs": macs, "model/params": params, "model/units": units}
        case _:
            assert_never(event)


@contextlib.contextmanager
def _needs(extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise RecipeError(
            f"track: {extra} needs a package that is not installed ({error.name}): pip install 'dpm-cli[{extra}]'"
        ) from None

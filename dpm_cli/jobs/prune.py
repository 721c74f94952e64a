"""`dpm prune`: prune a trained model, the main job."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

from dpm_cli.display.page import write_page
from dpm_cli.engine.checkpoint import remove_checkpoints
from dpm_cli.engine.device import choose_device
from dpm_cli.engine.digest import digest
from dpm_cli.engine.distributed import World, join
from dpm_cli.engine.faults import explaining_faults
from dpm_cli.errors import OutputError
from dpm_cli.events import Event, PhaseBegan
from dpm_cli.files import (
    CHECKPOINT,
    MARKS,
    REPORT,
    created,
    is_unfinished,
    locked,
    prepare_output,
    read_regular_text,
    require_apart,
    require_ours,
    written_in,
)
from dpm_cli.jobs.alone import alone_in_process
from dpm_cli.jobs.loading import (
    AnyRecipe,
    OnEvent,
    follow,
    load_splits,
    make_setup,
    resolve_recipe,
    telling,
)
from dpm_cli.jobs.readiness import require_means, require_workable
from dpm_cli.jobs.starting import AnyModel, Start, load_start
from dpm_cli.jobs.tracking import tracking
from dpm_cli.jobs.verdict import find_missed
from dpm_cli.measure import flushing_denormals
from dpm_cli.recipe import Recipe, hash_recipe
from dpm_cli.report import Report
from dpm_cli.run.resolved import write_resolved
from dpm_cli.run.resume import require_same_weights
from dpm_cli.run.sparse_story import SparseRun
from dpm_cli.run.story import Run


@alone_in_process()
@flushing_denormals()  # decaying weights pass through denormals, which CPUs compute slowly
def prune(
    model: AnyModel | None,
    recipe: AnyRecipe,
    *,
    output: str | Path = "out",
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    lock: bool = True,
    on_event: OnEvent = None,
    should_stop: Callable[[], int] | None = None,
) -> Report:
    """Prune a trained model to the recipe's target; write slim.pt, the exports and the report into `output`.

        report = dpm_cli.prune("model.pt", "cifar10", output="out")

    model: a file; a module of the recipe's architecture (any module, if its code can build it again for `load`);
    "torchvision:NAME" or "timm:NAME" for published weights; None for those of `model.weights`.
    lock: false for a file system that cannot lock, if no other run writes into `output`.
    should_stop: called after every step; if it returns true or an exit code, the run writes a checkpoint and raises
    Interrupted. Under a launcher such as torchrun all processes prune together. Each calls `on_event` and returns the
    report; only the first one writes files.
    Raises a DpmError whose message is one line and whose `exit_code` is the command line's; a MissedError after
    everything was written carries the report.
    """
    recipe, folder = resolve_recipe(recipe, trust=trust), Path(output)
    with join(device) as world:
        if world.share(resume and (folder / REPORT).exists() and not is_unfinished(folder / CHECKPOINT)):
            return _judge(_finished(folder, world, model, recipe, trust))
        tell = telling(on_event)
        tell(PhaseBegan("load", "loading the model"))
        torch_device = choose_device(device)
        start = load_start(model, recipe, trust)
        require_means(recipe, start, folder)
        require_workable(recipe, start)
        # A run cannot be resumed with another batch size.
        with (
            explaining_faults(recipe.data.batch, " --overwrite"),
            _claimed(folder, world, _inputs(model, recipe), overwrite=overwrite, resume=resume, lock=lock),
        ):
            tell(PhaseBegan("load", "loading the images"))
            with world.main_first():
                splits = load_splits(recipe, torch_device, tell)
            setup = make_setup(recipe, splits, folder / CHECKPOINT, torch_device, should_stop, world)
            tell(PhaseBegan("analyse", "analysing the model"))
            kind = SparseRun if recipe.cuts_weights else Run
            run = kind(recipe, setup, start.module, arch=start.arch, output=folder)
            run.notes.extend(_remark_on_start(start, recipe, world))
            with _recording(recipe, folder, world, on_event, model, overwrite=overwrite) as tell:
                report = follow(run.events(resume=resume), tell)
            return _judge(report)


def _remark_on_start(start: Start, recipe: Recipe, world: World) -> Iterator[str]:
    yield from start.notes
    if start.arch is None:
        yield (
            f"the model is not what model.arch ({recipe.model.arch}) builds: load slim.pt again with "
            "dpm_cli.load(path, model=...) and a freshly built dense module"
        )
    if world.size > 1:
        yield f"trained by {world.size} processes"


def _inputs(model: AnyModel | None, recipe: Recipe) -> dict[str, str | Path | None]:
    path = model if isinstance(model, str | Path) else None
    return {"the model": path, "the recipe": recipe.source, "the data": recipe.data.root}


@contextlib.contextmanager
def _claimed(
    folder: Path, world: World, inputs: Mapping[str, str | Path | None], *, overwrite: bool, resume: bool, lock: bool
) -> Iterator[None]:
    """Lock the output folder in the main process, and check that this run may write there."""
    if not world.is_main:
        yield
        return
    with created(folder), locked(folder, wanted=lock):
        require_apart(inputs, written_in(folder), folder)
        prepare_output(folder, overwrite=overwrite, resume=resume)
        yield


@contextlib.contextmanager
def _recording(
    recipe: Recipe, folder: Path, world: World, on_event: OnEvent, model: AnyModel | None, *, overwrite: bool
) -> Iterator[Callable[[Event], None]]:
    """Log the run to other stores, and write report.html when it is over. Call when nothing is refused any more."""
    if not world.is_main:
        yield telling(on_event)
        return
    with tracking(recipe, folder, telling(on_event)) as tell:
        write_resolved(
            folder, recipe, str(model) if isinstance(model, str | Path) else None
        )  # so that --resume needs no repeated --set
        if overwrite:  # otherwise a later --resume would continue the abandoned run
            remove_checkpoints(folder / CHECKPOINT)
        yield tell
    write_page(folder)


def _finished(folder: Path, world: World, model: AnyModel | None, recipe: Recipe, trust: bool) -> Report:
    """Return the report of a finished run. Raises UsageError if it was made from another model or recipe."""
    report = cast(Report, world.share(_earlier_report(folder, recipe) if world.is_main else None))
    if report.origin is not None:
        start = load_start(model, recipe, trust)
        require_same_weights(report.origin, digest(start.module.state_dict()), folder / REPORT)
    return report


def _earlier_report(folder: Path, recipe: Recipe) -> Report:
    require_ours({folder / REPORT: MARKS[REPORT]})
    try:
        report = Report.from_json(read_regular_text(folder / REPORT))
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder / REPORT} is not a report: {error}; start anew with --overwrite") from None
    if report.recipe_hash != hash_recipe(recipe):
        raise OutputError(f"{folder} holds a finished run of another recipe: choose another folder, or --overwrite")
    return report


def _judge(report: Report) -> Report:
    """Return the report of a run that kept what was asked of it. Otherwise raises AccuracyError or TargetError."""
    if missed := find_missed(report):
        raise missed
    return report

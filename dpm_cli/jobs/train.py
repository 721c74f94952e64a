"""`dpm train`: train the dense model of a recipe."""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from dpm_cli.engine.allocator import keeping_freed_memory
from dpm_cli.engine.backends import tuned_backends
from dpm_cli.engine.checkpoint import remove_checkpoints
from dpm_cli.engine.device import choose_device
from dpm_cli.engine.distributed import World, join
from dpm_cli.engine.evaluate import evaluate_module
from dpm_cli.engine.faults import explaining_faults
from dpm_cli.engine.loop import State
from dpm_cli.engine.precision import choose_layout, lay_out_
from dpm_cli.engine.setup import Setup
from dpm_cli.errors import OutputError, RecipeError
from dpm_cli.events import Event, Note, PhaseBegan
from dpm_cli.files import (
    LOCK,
    checkpoint_of,
    created,
    is_unfinished,
    locked,
    marks_of,
    remove_leftovers,
    require_apart,
    require_ours,
    require_regular,
    require_resumable,
    require_utf8,
    write_atomic,
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
from dpm_cli.jobs.readiness import require_trainable
from dpm_cli.jobs.starting import Start, load_start
from dpm_cli.measure import count_parameters, flushing_denormals
from dpm_cli.models import build
from dpm_cli.recipe import Recipe
from dpm_cli.recipe.stages import Stage, number_epochs
from dpm_cli.results import Trained
from dpm_cli.run.course import Course, CourseHooks
from dpm_cli.run.journal import Journal
from dpm_cli.run.resume import Origin
from dpm_cli.tasks.classification import is_at_chance


@alone_in_process()
@flushing_denormals()
def train(
    recipe: AnyRecipe,
    *,
    output: str | Path = "model.pt",
    model: str | Path | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    lock: bool = True,
    on_event: OnEvent = None,
    should_stop: Callable[[], int] | None = None,
) -> Trained:
    """Train the dense model of a recipe (its `dense` section, else `train`) from `model`, `model.weights` or scratch.

        trained = dpm_cli.train("cifar10", output="model.pt")

    Checkpoints are written beside `output`: model.checkpoint.pt. resume: continue from there, bit for bit on a CPU.
    lock, should_stop and several processes: as for `prune`. Raises a DpmError.
    """
    recipe, path = resolve_recipe(recipe, trust=trust), Path(output)
    if not recipe.data.labels:
        raise RecipeError("data.labels is false, but training needs labels: set it to true")
    with join(device) as world, explaining_faults(recipe.data.batch, " --overwrite"):  # not resumed with another batch
        torch_device = choose_device(device)
        inputs = {"the model": model, "the recipe": recipe.source, "the data": recipe.data.root}
        with _claimed(path, world, inputs, overwrite=overwrite, resume=resume, lock=lock):
            tell = telling(on_event)
            tell(PhaseBegan("load", "loading the model"))
            torch.manual_seed(recipe.seed)
            start = _start_from(model, recipe, trust)
            tell(PhaseBegan("load", "loading the images"))
            with world.main_first():
                splits = load_splits(recipe, torch_device, tell)
            setup = make_setup(recipe, splits, checkpoint_of(path), torch_device, should_stop, world)
            setup.require_enough_images()
            training = _Training(recipe, setup, start.module, path)
            training.course.notes += start.notes
            if overwrite and world.is_main:
                remove_checkpoints(setup.checkpoint)  # otherwise a later --resume would continue the abandoned training
            return follow(training.events(resume=resume), on_event)


class _Trainee:
    """Holds the dense model in training."""

    teacher: nn.Module | None = None

    def __init__(self, module: nn.Module, recipe: Recipe, setup: Setup) -> None:
        self.layout = choose_layout(module, torch.zeros(2, *recipe.model.input))
        self.model = module.to(setup.device).train()
        lay_out_(self.model, self.layout)

    def state_dict(self) -> State:
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.model.load_state_dict(state["model"])


class _Training:
    """Tells the story of `dpm train`."""

    def __init__(self, recipe: Recipe, setup: Setup, module: nn.Module, path: Path) -> None:
        self.recipe, self.setup, self.path = recipe, setup, path
        origin = Origin.of(recipe, module, setup.splits)
        section = "dense." if recipe.dense else "train."
        stages = number_epochs([Stage("dense", recipe.dense or recipe.train, section)])
        self.trainee = _Trainee(module, recipe, setup)
        self.course = Course(setup, stages, self.trainee, origin, Journal(None))

    def events(self, *, resume: bool) -> Generator[Event, None, Trained]:
        course, setup, started = self.course, self.setup, time.monotonic()
        setup.world.require_same("the recipe, the model file or the data", course.origin.to_dict())
        yield from course.tell_new_notes()
        if resume:
            yield from course.restore()
        started -= sum(course.seconds.values())  # of earlier sessions
        if not course.is_over:
            with keeping_freed_memory(), tuned_backends(setup.device, setup.engine):
                yield from course.train(CourseHooks(course))
            yield from course.advance()
        yield PhaseBegan("measure", "measuring the accuracy on the test images")
        trained = self._finish(started)
        if is_at_chance(trained.accuracy, images=len(setup.splits.test), classes=self.recipe.model.classes):
            lr = (self.recipe.dense or self.recipe.train).lr
            yield Note(
                f"the model guesses: {trained.accuracy:.2f} % on the test images; lower lr ({lr:g}) or train longer"
            )
        yield from course.tell_corrupt()  # streamed test images are read only now
        yield from course.tell_new_notes()
        return trained

    def _finish(self, started: float) -> Trained:
        """Measure the model and write its weights in the main process; return the result in all processes."""
        setup, recipe, path, module = self.setup, self.recipe, self.path, self.trainee.model
        validation_accuracy = setup.validate(module)
        test = evaluate_module(module, setup.splits.test, batch=recipe.data.batch)
        trained = None
        if setup.world.is_main:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}

            def write(temporary: Path) -> None:
                with temporary.open("wb") as file:  # given a path, torch turns "disk full" into its own RuntimeError
                    torch.save(weights, file)

            write_atomic(path, write)
            trained = Trained(
                path=str(path),
                arch=recipe.model.arch,
                accuracy=test.accuracy,
                loss=test.loss,
                validation_accuracy=validation_accuracy,
                epochs=(recipe.dense or recipe.train).epochs,
                params=count_parameters(module),
                bytes=path.stat().st_size,
                seconds=round(time.monotonic() - started, 2),
                seed=recipe.seed,
                device=str(setup.device),
                precision=setup.precision.name,
            )
        self.course.forget()
        shared = setup.world.share(trained)
        assert shared is not None
        return shared


def _start_from(model: str | Path | None, recipe: Recipe, trust: bool) -> Start:
    spec = recipe.model
    if model is None and spec.weights is None:
        start = Start(build(spec.arch, classes=spec.classes, shape=spec.input), spec.arch)
    else:
        start = load_start(model, recipe, trust)
    require_trainable(recipe, start)
    return start


@contextlib.contextmanager
def _claimed(
    path: Path, world: World, inputs: Mapping[str, str | Path | None], *, overwrite: bool, resume: bool, lock: bool
) -> Iterator[None]:
    """Lock the file in the main process, and check that this training may write it."""
    if not world.is_main:
        yield
        return
    if overwrite and resume:
        raise OutputError("--resume continues a training and --overwrite starts it again: give one of them")
    require_utf8(path)
    if os.path.lexists(path):
        require_regular(path)
    checkpoint, name = checkpoint_of(path), f"{LOCK}-{path.stem}"  # model.pt and model.pth have the same checkpoints
    with created(path.parent), locked(path.parent, name, wanted=lock):
        ours = marks_of(checkpoint)
        require_apart(inputs, ours | {path: b""}, path.parent)
        require_ours(ours)
        has_begun = is_unfinished(checkpoint)
        if resume:
            require_resumable(path)
        elif path.exists() and not overwrite:
            raise OutputError(f"{path} exists: choose another --output, or --overwrite to replace it")
        if has_begun and not (overwrite or resume):
            raise OutputError(
                f"{checkpoint} is of an unfinished training: --resume continues it, --overwrite starts anew"
            )
        remove_leftovers(path.parent, (checkpoint.name, path.name))
        yield

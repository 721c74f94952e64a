"""`dpm train`: the dense model of a recipe."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dpm_cli.data import Splits, Waiting
from dpm_cli.engine.allocator import keeping_freed_memory
from dpm_cli.engine.device import choose_device
from dpm_cli.engine.distributed import is_launched
from dpm_cli.engine.evaluate import Score, evaluate_module
from dpm_cli.engine.faults import explaining_faults
from dpm_cli.engine.learner import Learner
from dpm_cli.engine.precision import Precision, choose_layout, choose_precision
from dpm_cli.engine.step import LossMeter, all_finite
from dpm_cli.errors import (
    OutputError,
    RecipeError,
    RunError,
    UsageError,
)
from dpm_cli.files import write_atomic
from dpm_cli.jobs.loading import AnyRecipe, OnEvent, load_module, load_splits, resolve_recipe
from dpm_cli.measure import count_parameters, flushing_denormals
from dpm_cli.models import build
from dpm_cli.recipe import Recipe
from dpm_cli.report import Event
from dpm_cli.results import Trained
from dpm_cli.run.events import epoch_event, step_event
from dpm_cli.run.story import augmentation


@flushing_denormals()
def train(
    recipe: AnyRecipe,
    *,
    output: str | Path = "model.pt",
    model: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    trust_pickle: bool = False,
    on_event: OnEvent = None,
) -> Trained:
    """Train the dense model of a recipe (its `dense` section, else `train`) from scratch, or on from a file."""
    recipe, path = resolve_recipe(recipe), Path(output)
    if is_launched():
        raise UsageError("dpm train runs in one process: start it without the launcher (dpm prune runs in several)")
    if not recipe.data.labels:
        raise RecipeError("data.labels is false, but training needs labels: set it to true")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists: choose another --output, or --overwrite to replace it")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder: create it, or choose another --output")
    torch_device = choose_device(device)
    precision = choose_precision(recipe.precision, torch_device)
    torch.manual_seed(recipe.seed)
    spec = recipe.model
    module = (
        build(spec.arch, classes=spec.classes, shape=spec.input)
        if model is None
        else load_module(model, recipe, trust_pickle)[0]
    )
    with explaining_faults(recipe.data.batch):
        splits = load_splits(recipe, torch_device)
        return _train_dense(recipe, module, splits, path, torch_device, precision, on_event or (lambda event: None))


def _train_dense(
    recipe: Recipe,
    module: nn.Module,
    splits: Splits,
    path: Path,
    torch_device: torch.device,
    precision: Precision,
    tell: Callable[[Event], None],
) -> Trained:
    started = time.monotonic()
    layout = choose_layout(module, torch.zeros(2, *recipe.model.input))
    module = module.to(torch_device).to(memory_format=layout).train()
    training, batch = recipe.dense or recipe.train, recipe.data.batch
    per_epoch = max(1, len(splits.train) // batch)
    learner = Learner(
        module,
        precision=precision,
        steps=training.epochs * per_epoch,
        steps_per_epoch=per_epoch,
        layout=layout,
        seed=recipe.seed,
        **training.model_dump(exclude={"epochs"}),
    )
    tell({"event": "stage", "name": "dense"})
    validation: Score | None = None
    with keeping_freed_memory():
        for epoch in range(training.epochs):
            meter, waiting, epoch_started = LossMeter(torch_device), Waiting(), time.monotonic()
            batches = splits.train.batches(
                batch, seed=recipe.seed, epoch=epoch, augment=augmentation(recipe), drop_last=len(splits.train) >= batch
            )
            for step, (images, labels) in enumerate(waiting.timed(batches), epoch * per_epoch):
                meter.add_(learner.step_(images, labels, step=step), images=len(labels), step=step)
                tell(step_event(stage="dense", step=step + 1, steps=learner.steps, steps_per_epoch=per_epoch))
            reading = meter.read()
            if reading.first_bad_step is not None or not all_finite(learner.tensors()):
                bad = reading.first_bad_step
                when = f"at step {bad}" if bad is not None else f"in epoch {epoch + 1}"
                section = "dense" if recipe.dense else "train"
                raise RunError(
                    f"the loss or a weight is not finite {when}: lower {section}.lr or set {section}.clip_grad"
                )
            if len(splits.validation):
                validation = evaluate_module(module, splits.validation, batch=batch, precision=precision)
            tell(
                epoch_event(
                    stage="dense",
                    epoch=epoch + 1,
                    epochs=training.epochs,
                    step=(epoch + 1) * per_epoch,
                    loss=reading.mean,
                    validation_accuracy=validation.accuracy if validation else None,
                    lr=learner.learning_rate((epoch + 1) * per_epoch - 1),
                    images=reading.images,
                    seconds=time.monotonic() - epoch_started,
                    waited=waiting.seconds,
                )
            )
    test = evaluate_module(module, splits.test, batch=batch)
    if len(splits.corrupt):
        tell({"event": "note", "text": splits.corrupt.note})
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, torch turns "disk full" into a RuntimeError of its own
            torch.save(weights, file)

    write_atomic(path, write)
    return Trained(
        path=str(path),
        arch=recipe.model.arch,
        accuracy=test.accuracy,
        loss=test.loss,
        validation_accuracy=validation.accuracy if validation else None,
        epochs=training.epochs,
        params=count_parameters(module),
        bytes=path.stat().st_size,
        seconds=round(time.monotonic() - started, 2),
        seed=recipe.seed,
        device=str(torch_device),
        precision=precision.name,
    )

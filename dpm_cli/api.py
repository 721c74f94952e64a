"""The public functions. Each takes a recipe and returns plain values; nothing here prints."""

import contextlib
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dpm_cli.data import Splits, Waiting, load_data
from dpm_cli.delivery import EXPORT_NAMES
from dpm_cli.engine.allocator import keeping_freed_memory
from dpm_cli.engine.checkpoint import remove_checkpoints
from dpm_cli.engine.device import choose_device
from dpm_cli.engine.distributed import is_launched, join
from dpm_cli.engine.evaluate import Score, evaluate_module
from dpm_cli.engine.evaluate import evaluate as score_runner
from dpm_cli.engine.faults import explaining_faults
from dpm_cli.engine.learner import Learner
from dpm_cli.engine.loss import main_output
from dpm_cli.engine.precision import Precision, choose_layout, choose_precision
from dpm_cli.engine.step import LossMeter, all_finite
from dpm_cli.errors import (
    AccuracyError,
    DpmError,
    ModelFileError,
    OutputError,
    RecipeError,
    RunError,
    UnsupportedModelError,
    UsageError,
)
from dpm_cli.export import ExportedModel, export_model, is_program, open_exported
from dpm_cli.files import REPORT, is_unfinished, locked, prepare_output, require_writable, write_atomic
from dpm_cli.measure import count_bytes, count_macs, count_parameters, flushing_denormals, measure_latency
from dpm_cli.metrics import epoch_event, step_event
from dpm_cli.models import apply_edits_, build, find_edits, load_model, load_slim
from dpm_cli.models.outputs import find_failure, relative_difference, sample_images
from dpm_cli.models.own_code import one_line
from dpm_cli.models.slim import TOLERANCE
from dpm_cli.models.structure import named_tensors
from dpm_cli.plan import Plan
from dpm_cli.recipe import Recipe, load_recipe, parse_recipe
from dpm_cli.report import Event, ExportedFile, Report
from dpm_cli.run import Run, augmentation
from dpm_cli.sensitivity import measure_sensitivity, take_images

AnyRecipe = Recipe | str | Path | Mapping[str, Any]
OnEvent = Callable[[Event], None] | None


@flushing_denormals()  # decaying weights pass through denormals, which CPUs compute slowly
def prune(
    model: nn.Module | str | Path,
    recipe: AnyRecipe,
    *,
    output: str | Path = "out",
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust_pickle: bool = False,
    on_event: OnEvent = None,
    should_stop: Callable[[], int] | None = None,
) -> Report:
    """Prune a trained model to the recipe's target; write slim.pt, the exports and the report into `output`.

    model: a file, or a module of the recipe's architecture (any module, if its code can be given again to `load`).
    should_stop: asked after every step; when true, or the exit code to stop with, the run writes a checkpoint and
    raises Interrupted. Started by a launcher such as torchrun, all of its processes do this together; each calls
    `on_event` and returns the report, the first one alone writes.
    Raises a DpmError whose message is one line and whose `exit_code` is the command line's; an AccuracyError comes
    after everything was written, and brings the report.
    """
    with join(device) as world, contextlib.ExitStack() as stack:
        recipe, folder = _resolve(recipe), Path(output)
        if world.share(resume and (folder / REPORT).exists() and not is_unfinished(folder)):
            return cast(Report, world.share(_earlier_report(folder, recipe) if world.is_main else None))
        torch_device = choose_device(device)
        precision = choose_precision(recipe.precision, torch_device)
        module, arch = _load(model, recipe, trust_pickle)
        # A run cannot go on with another batch.
        stack.enter_context(explaining_faults(recipe.data.batch, " --overwrite"))
        if world.is_main:
            require_writable(folder)
            stack.enter_context(locked(folder))
            prepare_output(folder, overwrite=overwrite, resume=resume)
        with world.main_first():
            splits = load_splits(recipe, torch_device)
        run = Run(
            module,
            recipe,
            splits,
            arch=arch,
            output=folder,
            device=torch_device,
            precision=precision,
            should_stop=should_stop or (lambda: False),
            world=world,
        )
        if overwrite and world.is_main:
            remove_checkpoints(folder)  # or a later --resume would go on with the run that was given up
        if arch is None:
            run.notes.append(
                f"the model is not what model.arch ({recipe.model.arch}) builds: load slim.pt again with "
                "dpm_cli.load(path, model=...) and a freshly built dense module"
            )
        if world.size > 1:
            run.notes.append(f"trained by {world.size} processes")
        for event in run.events(resume=resume):
            if on_event:
                on_event(event)
    return run.report


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
) -> dict[str, Any]:
    """Train the dense model of a recipe (its `dense` section, else `train`) from scratch, or on from a file."""
    recipe, path = _resolve(recipe), Path(output)
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
        else _load(model, recipe, trust_pickle)[0]
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
) -> dict[str, Any]:
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
    return {
        "path": str(path),
        "arch": recipe.model.arch,
        "accuracy": test.accuracy,
        "loss": test.loss,
        "validation_accuracy": validation.accuracy if validation else None,
        "epochs": training.epochs,
        "params": count_parameters(module),
        "bytes": path.stat().st_size,
        "seconds": round(time.monotonic() - started, 2),
        "seed": recipe.seed,
        "device": str(torch_device),
        "precision": precision.name,
    }


def evaluate(
    file: str | Path,
    recipe: AnyRecipe,
    *,
    device: str = "auto",
    trust_pickle: bool = False,
    latency: bool = True,
    latency_batch: int = 1,
) -> dict[str, Any]:
    """Test accuracy, cost, size and latency of a dense, slim, TorchScript, ONNX or .pt2 file.

    Latency is of single images, and with `latency_batch` also of batches of that size; both on the CPU.
    """
    recipe = _resolve(recipe)
    if latency_batch < 1:
        raise UsageError(f"the batch is {latency_batch}; at least one image is needed")
    with explaining_faults(recipe.data.batch):
        return _evaluate(Path(file), recipe, device, trust_pickle, latency, latency_batch)


def _evaluate(
    path: Path, recipe: Recipe, device: str, trust_pickle: bool, latency: bool, latency_batch: int
) -> dict[str, Any]:
    batch = recipe.data.batch
    result: dict[str, Any] = {"file": str(path), "macs": None, "params": None}
    runner: Any = _open_exported(path, trust_pickle)
    if runner:
        splits = load_splits(recipe, torch.device("cpu"))
        score = score_runner(runner, splits.test, batch=batch) if splits.labelled else None
        name = {"onnx": "onnxruntime"}.get(runner.format, runner.format)
        result |= {"kind": runner.format, "bytes": path.stat().st_size}
    else:
        torch_device = choose_device(device)
        loaded = load_model(
            path,
            arch=recipe.model.arch,
            classes=recipe.model.classes,
            shape=recipe.model.input,
            trust_pickle=trust_pickle,
        )
        runner, name = loaded.module, "torch"
        splits = load_splits(recipe, torch_device)
        on_device = copy.deepcopy(runner).to(torch_device)
        score = evaluate_module(on_device, splits.test, batch=batch) if splits.labelled else None
        example = torch.zeros(1, *recipe.model.input)
        result |= {
            "kind": "slim" if loaded.edits else "dense",
            "macs": count_macs(runner, example, recipe.counter),
            "params": count_parameters(runner),
            "bytes": count_bytes(runner),
            "odd_widths": {
                layer: width
                for layer, sizes in loaded.edits.items()
                for key in ("out_channels", "out_features")
                if isinstance(width := sizes.get(key), int) and width % 8
            },
        }
    result |= {
        "accuracy": score.accuracy if score else None,
        "loss": score.loss if score else None,
        "images": score.images if score else 0,
        "unreadable": len(splits.corrupt),
    }
    result["latency"] = {}
    if latency:
        some = splits.test if len(splits.test) else splits.train
        image, _ = next(some.batches(1, seed=0, epoch=0, augment=None))
        result["latency"] = {name: _milliseconds(runner, image)}
        if latency_batch > 1:
            images = image.repeat(latency_batch, 1, 1, 1)
            result["latency_in_batches"] = {name: _milliseconds(runner, images) | {"batch": latency_batch}}
    return result


def _milliseconds(runner: Any, images: Tensor) -> dict[str, float]:
    """Of one call: median and quartiles."""
    measured = measure_latency(runner, images.cpu())
    return {"median": measured.median_ms, "low": measured.low_ms, "high": measured.high_ms}


def export_slim(
    slim: str | Path,
    *,
    formats: Sequence[str] = ("torchscript", "onnx"),
    output: str | Path = ".",
    overwrite: bool = False,
    arch: str | None = None,
    opset: int = 18,
) -> list[ExportedFile]:
    """Export a slim.pt again, without the run that made it.

    formats: torchscript, onnx, onnx-fp16, pt2. arch: needed for architectures of your own code. opset: of ONNX.
    """
    for format in formats:
        if format not in EXPORT_NAMES:
            raise UsageError(f"export format {format!r} is not known; known: {', '.join(EXPORT_NAMES)}")
    loaded, folder = load_slim(Path(slim), arch), Path(output)
    require_writable(folder)
    paths = {known: folder / name for known, name in EXPORT_NAMES.items() if known in formats}
    for path in paths.values():
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists: choose another --output, or --overwrite to replace it")
    metadata = {
        "arch": loaded.arch or "",
        "classes": str(loaded.classes),
        "mean": json.dumps(loaded.mean),
        "std": json.dumps(loaded.std),
        "input": json.dumps(loaded.shape),
        "dpm_recipe": str(loaded.report.get("recipe_hash", "")),
    }
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *loaded.shape, generator=generator)
    exported = []
    for format, path in paths.items():
        made = export_model(loaded.module, image, format=format, path=path, metadata=metadata, opset=opset)
        exported.append(ExportedFile(format, str(path), made.bytes, made.max_difference))
    return exported


def inspect(
    model: nn.Module | str | Path,
    recipe: AnyRecipe,
    *,
    sensitivity: float | None = None,
    images: int = 1000,
    device: str = "auto",
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """The plan without training: groups, what stays whole and why, what can be reached, and the widths it would give.

    The widths are those of all victims chosen at once from the weights as they are; training will shift some.
    sensitivity: also the accuracy and loss on so many validation `images` when each group alone loses this share of
    its units; `device` serves only that.
    """
    recipe = _resolve(recipe)
    if sensitivity is not None and not 0 < sensitivity < 1:
        raise UsageError(f"the share is {sensitivity:g}; it is a fraction of each group's units such as 0.5")
    if images < 1:
        raise UsageError(f"images is {images}; at least one is needed")
    if sensitivity is not None and not recipe.data.labels:
        raise UsageError("the sensitivity is measured with labels, but data.labels is false")
    module, arch = _load(model, recipe, trust_pickle)
    plan = Plan(module, recipe)
    result = {"arch": arch} | plan.to_dict()
    if sensitivity is not None:
        torch_device = choose_device(device)
        splits = load_splits(recipe, torch_device)
        held_out = bool(len(splits.validation))
        some = take_images(splits.validation if held_out else splits.train, images, batch=recipe.data.batch)
        dense, rows = measure_sensitivity(
            plan.module.to(torch_device), plan.groups, plan.scores, some, share=sensitivity
        )
        result["sensitivity"] = {
            "share": sensitivity,
            "split": "validation" if held_out else "train",
            "images": dense.images,
            "accuracy": dense.accuracy,
            "loss": dense.loss,
            "groups": [asdict(row) | {"layers": list(row.layers)} for row in rows],
        }
    return result


def load_splits(recipe: Recipe, device: torch.device) -> Splits:
    """The recipe's dataset, on the device if it fits."""
    data = recipe.data.model_dump(exclude={"batch", "augment"})
    return load_data(
        data.pop("name"),
        **data,
        shape=recipe.model.input,
        classes=recipe.model.classes,
        seed=recipe.seed,
        device=device,
    )


def _resolve(recipe: AnyRecipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(dict(recipe)) if isinstance(recipe, Mapping) else load_recipe(recipe)


def _load(model: nn.Module | str | Path, recipe: Recipe, trust_pickle: bool) -> tuple[nn.Module, str | None]:
    """A module in eval mode on the CPU, and its architecture's name if the recipe's name can build it."""
    spec = recipe.model
    if isinstance(model, nn.Module):
        module = copy.deepcopy(model).cpu().float().eval()
        _require_usable(module, recipe)
        return module, spec.arch if _is_built_by(module, recipe) else None
    loaded = load_model(model, arch=spec.arch, classes=spec.classes, shape=spec.input, trust_pickle=trust_pickle)
    return loaded.module, spec.arch


def _require_usable(module: nn.Module, recipe: Recipe) -> None:
    """Finite weights, and one row of logits per image."""
    spec = recipe.model
    if not all_finite(module.state_dict().values()):
        raise UsageError("the model holds weights that are NaN or infinite: it cannot be pruned")
    try:
        with torch.no_grad():
            logits = main_output(module(sample_images(module, spec.input)))
    except DpmError:
        raise
    except Exception as error:  # a user's module may raise anything
        raise UsageError(
            f"the model does not run on images of {list(spec.input)} ({one_line(error)}): check model.input"
        ) from None
    if logits.shape[1] != spec.classes:
        raise UsageError(f"the model gives {logits.shape[1]} logits, model.classes is {spec.classes}: make them agree")


def _is_built_by(module: nn.Module, recipe: Recipe) -> bool:
    """Whether the recipe's architecture, dense or pruned, computes the same as this module."""
    spec = recipe.model
    try:
        with torch.random.fork_rng(devices=[]):
            built = build(spec.arch, classes=spec.classes, shape=spec.input).eval()
        apply_edits_(built, find_edits(module, built), dict(named_tensors(module)))
    except (RecipeError, UnsupportedModelError, ModelFileError):
        return False
    if any(find_failure(network, spec.input, spec.classes) for network in (module, built)):
        return False
    return relative_difference(module, built, spec.input) <= TOLERANCE


def _open_exported(path: Path, trust_pickle: bool) -> ExportedModel | None:
    """A deployed file; nothing if the file may hold weights instead."""
    try:
        return open_exported(path, trust_pickle=trust_pickle)
    except ModelFileError:
        if is_program(path):
            raise
        return None


def _earlier_report(folder: Path, recipe: Recipe) -> Report:
    try:
        report = Report.from_json((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder / 'report.json'} is not a report: {error}; start anew with --overwrite") from None
    if report.recipe_hash != recipe.hash:
        raise OutputError(f"{folder} holds a finished run of another recipe: choose another folder, or --overwrite")
    if report.floor and report.floor.is_broken:
        raise AccuracyError(report.floor.text or "", report=report)
    return report

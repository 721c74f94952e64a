"""`dpm evaluate`: measure accuracy, cost, size and latency of a file."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dpm_cli.data import Splits
from dpm_cli.engine.device import choose_device
from dpm_cli.engine.evaluate import Score, evaluate_module
from dpm_cli.engine.evaluate import evaluate as score_runner
from dpm_cli.engine.faults import explaining_faults
from dpm_cli.errors import ModelFileError, UsageError
from dpm_cli.export import ExportedModel, require_runtime
from dpm_cli.files import size_of
from dpm_cli.jobs.loading import AnyRecipe, load_splits, open_deployed, resolve_recipe
from dpm_cli.measure import Run, count_bytes, count_macs, count_parameters, measure_latency
from dpm_cli.models import load_model
from dpm_cli.models.load import Loaded
from dpm_cli.recipe import Recipe
from dpm_cli.report import Milliseconds
from dpm_cli.results import BatchMilliseconds, Evaluated


def evaluate(
    file: str | Path,
    recipe: AnyRecipe,
    *,
    device: str = "auto",
    trust: bool = False,
    latency: bool = True,
    latency_batch: int = 1,
    runtime: str | None = None,
) -> Evaluated:
    """Measure test accuracy, cost, size and latency of a dense or slim model, or of an exported file.

    Latency is measured on the CPU for single images and, with `latency_batch`, also for batches of that size.
    runtime: torch, onnxruntime, openvino, executorch or tensorrt; by default the usual one for the file.
    """
    recipe, path = resolve_recipe(recipe, trust=trust), Path(file)
    if latency_batch < 1:
        raise UsageError(f"the batch is {latency_batch}; at least one image is needed")
    with explaining_faults(recipe.data.batch):
        exported = open_deployed(path, trust, runtime=runtime)
        run: Run
        if exported:
            run, runtime = exported, runtime or {"onnx": "onnxruntime"}.get(exported.format, exported.format)
            splits = load_splits(recipe, torch.device("cpu"))
            result = _score_exported(path, exported, recipe, splits)
        else:
            if runtime not in (None, "torch"):
                require_runtime(runtime)
                raise UsageError(f"{path} holds weights, which torch runs: dpm export SLIM writes files for {runtime}")
            torch_device, spec = choose_device(device), recipe.model
            loaded = load_model(path, arch=spec.arch, classes=spec.classes, shape=spec.input, trust=trust)
            run, runtime = loaded.module, "torch"
            splits = load_splits(recipe, torch_device)
            result = _score_weights(path, loaded, recipe, splits, torch_device)
        return _with_latency(result, run, runtime, splits, latency_batch) if latency else result


def _score_exported(path: Path, exported: ExportedModel, recipe: Recipe, splits: Splits) -> Evaluated:
    def logits(images: Tensor) -> Tensor:
        outputs, classes = exported(images), recipe.model.classes
        if outputs.shape != (len(images), classes):
            wanted = [len(images), classes]
            raise ModelFileError(f"{path} gives {list(outputs.shape)} for {len(images)} images, not {wanted}")
        return outputs

    score = score_runner(logits, splits.test, batch=recipe.data.batch) if splits.labelled else None
    macs, params = exported.cost(exported.shape or recipe.model.input)
    return replace(_combine(path, exported.format, size_of(path), score, splits), macs=macs, params=params)


def _score_weights(path: Path, loaded: Loaded, recipe: Recipe, splits: Splits, device: torch.device) -> Evaluated:
    module = loaded.module
    on_device = copy.deepcopy(module).to(device)
    score = evaluate_module(on_device, splits.test, batch=recipe.data.batch) if splits.labelled else None
    return replace(
        _combine(path, "slim" if loaded.edits else "dense", count_bytes(module), score, splits),
        macs=count_macs(module, torch.zeros(1, *recipe.model.input), recipe.counter),
        params=count_parameters(module),
        odd_widths={
            layer: width
            for layer, sizes in loaded.edits.items()
            for key in ("out_channels", "out_features")
            if isinstance(width := sizes.get(key), int) and width % 8
        },
    )


def _combine(path: Path, kind: str, size: int, score: Score | None, splits: Splits) -> Evaluated:
    """Call after scoring, which finds the unreadable images of streamed data. Raises ModelFileError for NaN."""
    if score and not math.isfinite(score.loss):
        raise ModelFileError(
            f"{path} gives logits that are NaN or infinite: it is damaged, or was trained until it broke"
        )
    return Evaluated(
        file=str(path),
        kind=kind,
        bytes=size,
        accuracy=score.accuracy if score else None,
        loss=score.loss if score else None,
        images=score.images if score else 0,
        unreadable=len(splits.corrupt),
    )


def _with_latency(result: Evaluated, run: Run, runtime: str, splits: Splits, batch: int) -> Evaluated:
    some = splits.test if len(splits.test) else splits.train
    image, _ = next(some.batches(1, seed=0, epoch=0, augment=None))  # (1, C, H, W)
    result = replace(result, latency={runtime: _measure(run, image)})
    if batch == 1:
        return result
    each = _measure(run, image.repeat(batch, 1, 1, 1))
    in_batches = BatchMilliseconds(**vars(each), batch=batch)
    return replace(result, latency_in_batches={runtime: in_batches})


def _measure(run: Run, images: Tensor) -> Milliseconds:
    measured = measure_latency(run, images.cpu())
    return Milliseconds(measured.median_ms, measured.low_ms, measured.high_ms, measured.threads, measured.doubt)

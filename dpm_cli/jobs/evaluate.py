"""`dpm evaluate`: accuracy, cost, size and latency of a file."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpm_cli.engine.device import choose_device
from dpm_cli.engine.evaluate import evaluate as score_runner
from dpm_cli.engine.evaluate import evaluate_module
from dpm_cli.engine.faults import explaining_faults
from dpm_cli.errors import (
    ModelFileError,
    UsageError,
)
from dpm_cli.export import ExportedModel, is_program, open_exported
from dpm_cli.jobs.loading import AnyRecipe, load_splits, resolve_recipe
from dpm_cli.measure import count_bytes, count_macs, count_parameters, measure_latency
from dpm_cli.models import load_model
from dpm_cli.recipe import Recipe


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
    recipe = resolve_recipe(recipe)
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


def _open_exported(path: Path, trust_pickle: bool) -> ExportedModel | None:
    """A deployed file; nothing if the file may hold weights instead."""
    try:
        return open_exported(path, trust_pickle=trust_pickle)
    except ModelFileError:
        if is_program(path):
            raise
        return None

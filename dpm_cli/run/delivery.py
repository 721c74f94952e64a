"""What a run hands over: exported files, measurements, the report and the slim file, all in one folder."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_cli.data import Splits
from dpm_cli.engine.evaluate import evaluate_module
from dpm_cli.errors import RunError
from dpm_cli.export import Format, export_model, open_exported
from dpm_cli.files import write_atomic
from dpm_cli.graph import Groups
from dpm_cli.measure import count_bytes, count_macs, count_parameters, hardware, measure_in_turns
from dpm_cli.method.pruning import Pruning
from dpm_cli.models import save_slim
from dpm_cli.recipe import Recipe, dump_recipe, hash_recipe
from dpm_cli.report import (
    ExportedFile,
    FloorReport,
    KeptLayer,
    Measured,
    Milliseconds,
    Report,
    TargetReport,
    UnitCounts,
    Width,
)
from dpm_cli.run.accuracy_floor import Floor
from dpm_cli.sparse.cut import CutModel
from dpm_cli.sparse.polarise import count_kept

EXPORT_NAMES: dict[Format, str] = {
    "torchscript": "model.ts",
    "onnx": "model.onnx",
    "onnx-fp16": "model.fp16.onnx",
    "pt2": "model.pt2",
}


@dataclass(frozen=True)
class Delivery:
    """How the results of one run leave it. Every module that is handed over is in eval mode on the CPU."""

    recipe: Recipe
    splits: Splits
    arch: str | None  # none: the model is not what `model.arch` builds
    output: Path
    device: torch.device  # where accuracy is measured
    layout: torch.memory_format  # and in which
    dense: nn.Module
    groups: Groups  # of the dense model
    image: Tensor  # (1, C, H, W) a real input, on the CPU

    def export(self, slim: nn.Module) -> Iterator[ExportedFile]:
        """Write each file that the recipe asks for, load it again and compare. Raises RunError."""
        for format in self.recipe.export:
            path = self.output / EXPORT_NAMES[format]
            try:
                made = export_model(
                    slim, self.image, format=format, path=path, metadata=self._metadata(), opset=self.recipe.opset
                )
            except RunError as error:
                raise RunError(
                    f"{error}; the training is kept: --resume with --set export=[] does without it"
                ) from error
            yield ExportedFile(format, str(path), made.bytes, made.max_difference)

    def measure(self, slim: nn.Module, exports: Sequence[ExportedFile]) -> tuple[Measured, Measured]:
        """The dense and the slim model: accuracy on the test set, once, and latencies in turns."""
        image = self.image
        dense = copy.deepcopy(self.dense).to(memory_format=torch.contiguous_format).eval()
        runs: dict[str, Callable[[Tensor], object]] = {"dense torch": dense, "slim torch": slim}
        with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
            for made in exports:
                if made.format == "onnx":
                    path = Path(folder) / "dense.onnx"
                    export_model(dense, image, format="onnx", path=path, metadata={})
                    runs |= {"dense onnxruntime": open_exported(path), "slim onnxruntime": open_exported(made.path)}
            latencies = measure_in_turns(runs, image)
        measured = []
        for name, network in (("dense", dense), ("slim", slim)):
            on_device = copy.deepcopy(network).to(self.device).to(memory_format=self.layout)
            score = None
            if self.splits.labelled:
                score = evaluate_module(on_device, self.splits.test, batch=self.recipe.data.batch)
            measured.append(
                Measured(
                    macs=count_macs(network, image, self.recipe.counter),
                    params=count_parameters(network),
                    bytes=count_bytes(network),
                    accuracy=score.accuracy if score else None,
                    loss=score.loss if score else None,
                    latency={
                        key.split()[1]: Milliseconds(latency.median_ms, latency.low_ms, latency.high_ms)
                        for key, latency in latencies.items()
                        if key.startswith(name)
                    },
                )
            )
        return measured[0], measured[1]

    def make_report(
        self,
        measured: tuple[Measured, Measured],
        pruning: Pruning,
        exports: Sequence[ExportedFile],
        *,
        difference: float,
        seconds: Mapping[str, float],
        precision: str,
        validation_accuracy: float | None,
        floor: Floor | None,
        notes: Sequence[str],
        cuts: Sequence[CutModel] = (),
    ) -> Report:
        """measured: dense, slim. difference: the largest at any compaction. seconds: by stage."""
        recipe = self.recipe
        dense, slim = measured
        if cuts:
            slim = replace(slim, bytes=cuts[0].report.bytes)
        return Report(
            arch=self.arch,
            base=recipe.prune.base,
            method=name_method(recipe, pruning.decay.steps),
            dense=dense,
            slim=slim,
            target=_report_cut(cuts[0], recipe.prune.on_the_fly.threshold) if cuts else self._report_target(pruning),
            units=UnitCounts(
                self.groups.units, pruning.chosen, pruning.released, self.groups.units - pruning.groups.units
            ),
            widths=[Width(*width) for width in self.groups.widths(pruning.survivors)],
            kept=[KeptLayer(kept.layer, kept.reason) for kept in self.groups.kept],
            compact_difference=difference,
            exports=list(exports),
            files={
                name: str(self.output / file)
                for name, file in (
                    ("slim", "slim.pt"),
                    ("report", "report.json"),
                    ("recipe", "recipe.yaml"),
                    ("metrics", "metrics.jsonl"),
                )
            },
            seconds={name: round(spent, 2) for name, spent in seconds.items()},
            seed=recipe.seed,
            device=str(self.device),
            precision=precision,
            recipe_hash=hash_recipe(recipe),
            versions=dict(hardware()),
            validation_accuracy=validation_accuracy,
            notes=[
                *notes,
                *self._remarks(pruning, slim, bool(cuts)),
                *([floor.broken] if floor and floor.broken else []),
            ],
            floor=_report_floor(floor, pruning) if floor else None,
            sparsities=[cut.report for cut in cuts],
        )

    def _report_target(self, pruning: Pruning) -> TargetReport:
        target = self.recipe.prune.target
        return TargetReport(target.kind, target.amount, pruning.limit, pruning.dense_cost, pruning.cost())

    def _remarks(self, pruning: Pruning, slim: Measured, is_sparse: bool) -> Iterator[str]:
        """What a reader of the figures must know."""
        if is_sparse:
            yield (
                "single weights were cut: the file is smaller, but dense kernels compute zeros (and means) as fast as "
                "any other number, so MACs and latency stay as they were; the other bases remove whole channels"
            )
        cost = pruning.groups.cost
        predicted = cost.macs(pruning.all_alive), cost.parameters(pruning.all_alive)
        if self.recipe.counter != "flop_counter":
            yield f"MACs are counted by {self.recipe.counter}; the target is held by flop_counter's"
        elif predicted != (slim.macs, slim.params):
            yield f"predicted cost {predicted} differs from the measured one {(slim.macs, slim.params)}"
        if pruning.topped_up:
            why = "others were released" if pruning.released else f"{self.recipe.prune.base} condemned too few in time"
            yield f"{pruning.topped_up} units were chosen by score alone, after the planned rounds: {why}"
        if not self.splits.labelled:
            yield "data.labels is false: no accuracy was measured"
        if len(self.splits.corrupt):
            yield self.splits.corrupt.note
        if self.splits.test_held_out:
            yield "the folder has no test images: a fixed tenth of the training images served as the test set"

    def save(self, slim: nn.Module, report: Report, cuts: Sequence[CutModel] = ()) -> None:
        """Write slim.pt, recipe.yaml and, last, report.json: with it the run is finished."""
        if not cuts:
            self._save_slim(self.output / "slim.pt", slim, report, {})
        for cut in cuts:
            self._save_slim(Path(cut.report.file), cut.module, report, cut.masks)
        write_atomic(self.output / "recipe.yaml", lambda path: _write_text(path, dump_recipe(self.recipe)))
        write_atomic(self.output / "report.json", lambda path: _write_text(path, report.to_json() + "\n"))

    def _save_slim(self, path: Path, module: nn.Module, report: Report, masks: Mapping[str, Tensor]) -> None:
        save_slim(
            path,
            copy.deepcopy(module).cpu().to(memory_format=torch.contiguous_format).eval(),
            arch=self.arch,
            classes=self.recipe.model.classes,
            shape=self.recipe.model.input,
            recipe=dump_recipe(self.recipe),
            report=report.to_dict(),
            mean=self.splits.mean,
            std=self.splits.std,
            dense=self.dense if self.arch is None else None,
            masks=masks,
        )

    def _metadata(self) -> dict[str, str]:
        return {
            "dpm_recipe": hash_recipe(self.recipe),
            "arch": self.arch or "",
            "classes": str(self.recipe.model.classes),
            "mean": json.dumps(self.splits.mean),
            "std": json.dumps(self.splits.std),
            "input": json.dumps(self.recipe.model.input),
        }


def name_method(recipe: Recipe, decay_steps: int) -> str:
    """The base pruner, and DPM if it is on: one-step pruning is the base alone, as is HESSO with its own envelope."""
    prune, decay = recipe.prune, recipe.decay
    name: str = prune.base
    if prune.base == "otov2" and prune.otov2.variant != "dhspg":
        name += f" ({prune.otov2.variant})"
    if prune.base == "depgraph" and prune.importance != "group-norm":
        name += f" ({prune.importance})"
    is_on = decay_steps > 1 and (decay.envelope != "multiplicative" or decay.rectify is not None)
    return f"{name} + DPM" if is_on else name


def _report_cut(cut: CutModel, threshold: float | None) -> TargetReport:
    """As weights that are left, of those that may be cut. With a threshold, whatever it leaves is what was asked."""
    weights = sum(mask.numel() for mask in cut.masks.values())
    kept = sum(int(mask.sum()) for mask in cut.masks.values())
    if threshold is not None:
        return TargetReport("sparsity", cut.report.reached, kept, weights, kept)
    asked = cut.report.asked
    return TargetReport("sparsity", asked, count_kept(cut.masks.values(), asked), weights, kept)


def _report_floor(floor: Floor, pruning: Pruning) -> FloorReport:
    kept_from_target = floor.broken is not None and pruning.cost() > pruning.limit
    return FloorReport(floor.max_drop, floor.dense, floor.limit, kept_from_target, floor.broken)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

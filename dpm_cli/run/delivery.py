"""Write the results of a run into one folder: exports, measurements, report and slim file."""

import copy
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_cli.engine.evaluate import evaluate, evaluate_module
from dpm_cli.engine.precision import lay_out_
from dpm_cli.engine.setup import Setup
from dpm_cli.errors import AccuracyError, FormatError, RunError
from dpm_cli.events import Event, Exported, PhaseBegan
from dpm_cli.export import Format, export_model, open_exported
from dpm_cli.files import METADATA, METRICS, REPORT, write_text_atomic
from dpm_cli.layers.images import Framing
from dpm_cli.measure import count_bytes, count_macs, count_parameters, hardware, measure_in_turns
from dpm_cli.models import Metadata, save_slim
from dpm_cli.models.metadata import printable_names
from dpm_cli.recipe import Recipe, dump_recipe, hash_recipe
from dpm_cli.report import ExportedFile, Measured, Milliseconds, Report
from dpm_cli.run.exporting import EXPORT_NAMES, OWN_RUNTIMES, export_one, make_calibration
from dpm_cli.run.mistakes import find_mistakes
from dpm_cli.run.outcome import Outcome, remark_on_chance, remark_on_cost, remark_on_data, remark_on_teacher
from dpm_cli.run.resolved import read_model, write_resolved

FILES = {"slim": "slim.pt", "report": REPORT, "recipe": "recipe.yaml", "metrics": METRICS}


@dataclass(frozen=True)
class Delivery:
    """Exports, measures and saves the results of one run, in the main process."""

    recipe: Recipe
    setup: Setup
    arch: str | None  # None unless `model.arch` builds the model
    output: Path
    dense: nn.Module  # in eval mode on the CPU
    layout: torch.memory_format  # memory format for measuring accuracy

    def deliver(
        self, model: nn.Module, outcome: Outcome, seconds: Mapping[str, float]
    ) -> Generator[Event, None, Report]:
        """Export, measure, report and save a trained model; all processes get the report.

        seconds: by stage. Raises RunError.
        """
        world, report = self.setup.world, None
        if world.is_main:
            slim = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval()
            report = yield from self._deliver(slim, outcome, seconds)
        shared = world.share(report)
        assert shared is not None
        return shared

    def _deliver(
        self, slim: nn.Module, outcome: Outcome, seconds: Mapping[str, float]
    ) -> Generator[Event, None, Report]:
        """slim: in eval mode on the CPU."""
        image, started = self.setup.check_images()[:1].cpu(), time.monotonic()
        exports: list[ExportedFile] = []
        failures: list[AccuracyError | FormatError] = []
        for format in self.recipe.export:
            yield PhaseBegan("export", f"exporting {EXPORT_NAMES[format]}")
            try:
                made = self._export(format, slim, image)
            except (AccuracyError, FormatError) as error:  # the other files are worth having
                failures.append(error)
            else:
                exports.append(made)
                yield Exported(format=made.format, path=made.path, max_difference=made.max_difference)
        cannot = [error for error in failures if isinstance(error, FormatError)]
        if cannot and not exports:
            raise _kept_training(cannot[0]) from cannot[0]
        exported = time.monotonic()
        yield PhaseBegan("measure", "measuring accuracy and latency of the dense and the slim model")
        dense, measured, exports = self._measure(slim, image, exports)
        yield from self._find_mistakes(slim)
        spent = {**seconds, "export": exported - started, "measure": time.monotonic() - exported}
        outcome = replace(outcome, remarks=[*outcome.remarks, *map(str, failures)])
        report = self._make_report(dense, measured, outcome, exports, spent)
        self._save(slim, report, outcome)
        return report

    def _export(self, format: Format, slim: nn.Module, image: Tensor) -> ExportedFile:
        """Write one file, reload it and compare.

        Raises RunError, FormatError if the format cannot hold the model, or AccuracyError if int8 costs too much.
        """
        try:
            return export_one(
                slim,
                image,
                format,
                self.output,
                metadata=self._metadata().to_strings(),
                opset=self.recipe.opset,
                calibration=make_calibration(self.recipe, self.setup.splits) if format == "onnx-int8" else None,
            )
        except FormatError:
            raise
        except RunError as error:
            raise _kept_training(error) from error

    def _find_mistakes(self, slim: nn.Module) -> Iterator[Event]:
        setup = self.setup
        dense, slim = (copy.deepcopy(network).to(setup.device).eval() for network in (self.dense, slim))
        for network in (dense, slim):
            lay_out_(network, self.layout)
        yield from find_mistakes(dense, slim, setup.splits, batch=setup.data.batch)

    def _measure(
        self, slim: nn.Module, image: Tensor, exports: Sequence[ExportedFile]
    ) -> tuple[Measured, Measured, list[ExportedFile]]:
        """Measure dense, slim, and the files that run elsewhere: test accuracy once, and latencies in turns."""
        dense = copy.deepcopy(self.dense).to(memory_format=torch.contiguous_format).eval()
        runs: dict[str, Callable[[Tensor], object]] = {"dense torch": dense, "slim torch": slim}
        own = [made for made in exports if made.format in OWN_RUNTIMES]
        sizes: dict[str, int] = {}
        with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
            path = Path(folder) / "dense.onnx"
            if own or any(made.format in ("onnx", "openvino") for made in exports):
                sizes["dense"] = export_model(dense, image, format="onnx", path=path, metadata={}).bytes
                runs["dense onnxruntime"] = open_exported(path, trust=True)
            for made in exports:
                if made.format == "onnx":
                    runs["slim onnxruntime"], sizes["slim"] = open_exported(made.path, trust=True), made.bytes
                elif made.format == "openvino":
                    runs["dense openvino"] = open_exported(path, trust=True, runtime="openvino")
                    runs["slim openvino"] = open_exported(made.path, trust=True)
                elif made in own:
                    runs[made.path] = open_exported(made.path, trust=True)
            latencies = {
                name: Milliseconds(latency.median_ms, latency.low_ms, latency.high_ms, latency.threads, latency.doubt)
                for name, latency in measure_in_turns(runs, image).items()
            }
        measured = []
        for name, network in (("dense", dense), ("slim", slim)):
            times = {key.split()[1]: latency for key, latency in latencies.items() if key.startswith(f"{name} ")}
            measured.append(replace(self._measure_one(network, image, times), onnx_bytes=sizes.get(name)))
        finished = [
            replace(
                made,
                runtime=OWN_RUNTIMES[made.format],
                accuracy=self._score(Path(made.path)),
                latency=latencies[made.path],
            )
            if made in own
            else made
            for made in exports
        ]
        return measured[0], measured[1], finished

    def _score(self, path: Path) -> float | None:
        """Measure the test accuracy of an exported file."""
        splits = self.setup.splits
        if not splits.labelled:
            return None
        return evaluate(open_exported(path, trust=True), splits.test, batch=self.setup.data.batch).accuracy

    def _measure_one(self, network: nn.Module, image: Tensor, latency: dict[str, Milliseconds]) -> Measured:
        setup, score = self.setup, None
        if setup.splits.labelled:
            on_device = copy.deepcopy(network).to(setup.device)
            lay_out_(on_device, self.layout)
            score = evaluate_module(on_device, setup.splits.test, batch=setup.data.batch)
        return Measured(
            macs=count_macs(network, image, self.recipe.counter),
            params=count_parameters(network),
            bytes=count_bytes(network),
            accuracy=score.accuracy if score else None,
            loss=score.loss if score else None,
            latency=latency,
        )

    def _make_report(
        self,
        dense: Measured,
        slim: Measured,
        outcome: Outcome,
        exports: Sequence[ExportedFile],
        seconds: Mapping[str, float],
    ) -> Report:
        setup, recipe = self.setup, self.recipe
        floor = [outcome.floor.text] if outcome.floor and outcome.floor.text else []
        if outcome.cuts:
            slim = replace(slim, bytes=outcome.cuts[0].report.bytes)
        scores = (dense.accuracy, slim.accuracy, setup.splits)
        learnt = [*remark_on_chance(*scores, recipe), *(remark_on_teacher(*scores) if outcome.taught else ())]
        cost = remark_on_cost(recipe, outcome.predicted, (slim.macs, slim.params))
        return Report(
            arch=self.arch,
            base=recipe.prune.base,
            method=outcome.method,
            dense=dense,
            slim=slim,
            target=outcome.target,
            targets=list(outcome.targets),
            units=outcome.units,
            widths=list(outcome.widths),
            kept=list(outcome.kept),
            compact_difference=outcome.difference,
            exports=list(exports),
            files={name: str(self.output / file) for name, file in FILES.items()},
            seconds={name: round(spent, 2) for name, spent in seconds.items()},
            seed=recipe.seed,
            device=str(setup.device),
            precision=setup.precision.name,
            recipe_hash=hash_recipe(recipe),
            versions={**hardware(), "processes": setup.world.size},
            validation_accuracy=outcome.validation_accuracy,
            notes=[*outcome.notes, *cost, *outcome.remarks, *learnt, *remark_on_data(setup.splits), *floor],
            floor=outcome.floor,
            sparsities=[cut.report for cut in outcome.cuts],
        )

    def _save(self, slim: nn.Module, report: Report, outcome: Outcome) -> None:
        """Write slim.pt, model.json, recipe.yaml and finally report.json, which marks the run as finished."""
        if not outcome.cuts:
            self._save_slim(self.output / "slim.pt", slim, report, {})
        for cut in outcome.cuts:
            self._save_slim(Path(cut.report.file), cut.module, report, cut.masks)
        write_text_atomic(self.output / METADATA, self._metadata().to_json())
        write_resolved(self.output, self.recipe, read_model(self.output))
        write_text_atomic(self.output / REPORT, report.to_json() + "\n")

    def _save_slim(self, path: Path, module: nn.Module, report: Report, masks: Mapping[str, Tensor]) -> None:
        save_slim(
            path,
            copy.deepcopy(module).cpu().to(memory_format=torch.contiguous_format).eval(),
            metadata=self._metadata(),
            recipe=dump_recipe(self.recipe),
            report=report.to_dict(),
            dense=self.dense if self.arch is None else None,
            masks=masks,
        )

    def _metadata(self) -> Metadata:
        recipe, splits = self.recipe, self.setup.splits
        return Metadata(
            classes=recipe.model.classes,
            framing=Framing(recipe.model.input, recipe.data.resize, recipe.data.crop),
            mean=splits.mean,
            std=splits.std,
            names=printable_names(splits.names),
            arch=self.arch,
            recipe_hash=hash_recipe(recipe),
        )


def _kept_training(error: RunError) -> RunError:
    return RunError(f"{error}; the training is kept: --resume with --set export=[] does without it")

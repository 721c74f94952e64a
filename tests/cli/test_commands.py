"""Every command hands its options to the public function of its name and shows what comes back."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import dpm_cli
from dpm_cli.errors import AccuracyError, MissedError, TargetError, UnreadableError
from dpm_cli.events import Note
from dpm_cli.layers.images import Framing
from dpm_cli.models import Metadata, build, save_slim
from dpm_cli.report import ExportedFile, KeptLayer, Milliseconds, Report
from dpm_cli.results import (
    BatchMilliseconds,
    Benchmarked,
    Evaluated,
    GroupSensitivity,
    Guess,
    Inspected,
    PlannedGroup,
    PlannedTarget,
    Predicted,
    Sensitivity,
    Trained,
)


class Recorder:
    """Stands in for a public function: remembers the call, tells an event, returns a result."""

    def __init__(self, result: object) -> None:
        self.result = result
        self.given: tuple[object, ...] = ()
        self.options: dict[str, Any] = {}

    def __call__(self, *given: object, **options: Any) -> object:
        self.given, self.options = given, options
        if tell := options.get("on_event"):
            tell(Note("working"))
        print("a library's chatter")
        return self.result


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(name: str, result: object) -> Recorder:
        recorder = Recorder(result)
        monkeypatch.setattr(dpm_cli, name, recorder)
        return recorder

    return put


TRAINED = Trained(
    path="model.pt",
    arch="digits",
    accuracy=98.87,
    loss=0.05,
    validation_accuracy=None,
    epochs=20,
    params=77_300,
    bytes=322_545,
    seconds=4.2,
    seed=0,
    device="cpu",
    precision="fp32",
)
EVALUATED = Evaluated(
    file="model.onnx",
    kind="onnx",
    bytes=142_229,
    accuracy=98.87,
    loss=0.0355,
    images=355,
    unreadable=0,
    latency={"onnxruntime": Milliseconds(0.025, 0.024, 0.055)},
)
PLAN = Inspected(
    arch="digits",
    dense={"macs": 2_116_224, "params": 77_300, "channels": 192},
    lowest={"macs": 50_000, "params": 3000, "channels": 24},
    round_to=4,
    target=PlannedTarget("macs", 0.45, 952_300, is_achievable=True),
    groups=(PlannedGroup("conv1", ("conv1", "block1.conv2"), units=32, lowest=4),),
    kept=(KeptLayer("linear", "output of the model"),),
)
SENSITIVITY = Sensitivity(
    share=0.5,
    split="validation",
    images=144,
    accuracy=95.0,
    loss=0.25,
    groups=(GroupSensitivity("conv1", ("conv1", "block1.conv2"), 32, 16, accuracy=94.0, loss=0.5, macs_saved=0.125),),
)


def test_prune_hands_over_every_option(dpm: Any, stand_in: Any, report: Report) -> None:
    recorder = stand_in("prune", report)
    ended = dpm(
        *("prune", "model.pt", "-r", "digits", "-o", "there", "--set", "prune.rounds=2", "--set", "seed=5"),
        *("--device", "cpu", "--seed", 3, "--resume", "--overwrite", "--trust"),
    )
    assert ended.code == 0
    model, recipe = recorder.given
    assert model == Path("model.pt")
    assert (recipe.prune.rounds, recipe.seed) == (2, 3)  # type: ignore[attr-defined]
    options = {key: recorder.options[key] for key in ("device", "resume", "overwrite", "trust", "output")}
    assert options == {
        "device": "cpu",
        "resume": True,
        "overwrite": True,
        "trust": True,
        "output": Path("there"),
    }
    assert recorder.options["should_stop"]() is False


def test_prune_is_careful_by_default(dpm: Any, stand_in: Any, report: Report) -> None:
    recorder = stand_in("prune", report)
    dpm("prune", "model.pt", "--recipe", "digits")
    assert recorder.options["output"] == Path("out")
    assert not any(recorder.options[key] for key in ("resume", "overwrite", "trust"))


def test_results_go_to_stdout_and_all_else_to_stderr(dpm: Any, stand_in: Any, report: Report) -> None:
    stand_in("prune", report)
    ended = dpm("prune", "model.pt", "-r", "digits")
    assert "125.7 M" in ended.out
    assert "chatter" not in ended.out
    assert ended.err.splitlines() == ["note: working", "a library's chatter"]


def test_with_json_stdout_is_the_report_alone(dpm: Any, stand_in: Any, report: Report) -> None:
    stand_in("prune", report)
    ended = dpm("prune", "model.pt", "-r", "digits", "--json", "--quiet")
    assert json.loads(ended.out) == json.loads(report.to_json())
    assert "working" not in ended.err
    assert "note: working" in dpm("prune", "model.pt", "-r", "digits", "--json").err


@pytest.mark.parametrize(("error", "code"), [(AccuracyError, 4), (TargetError, 3)])
def test_a_run_that_missed_something_shows_the_report_and_fails(
    dpm: Any, report: Report, monkeypatch: pytest.MonkeyPatch, error: type[MissedError], code: int
) -> None:
    def prune(*_: object, **__: object) -> None:
        raise error("round 2 broke the accuracy floor", report=report)

    monkeypatch.setattr(dpm_cli, "prune", prune)
    ended = dpm("prune", "model.pt", "-r", "digits")
    assert ended.code == code
    assert "125.7 M" in ended.out
    assert ended.err == "error: round 2 broke the accuracy floor\n"
    ended = dpm("prune", "model.pt", "-r", "digits", "--json")
    assert (ended.code, json.loads(ended.out)) == (code, json.loads(report.to_json()))


def test_a_target_that_is_refused_has_no_report(dpm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def prune(*_: object, **__: object) -> None:
        raise TargetError("target macs cannot be met")

    monkeypatch.setattr(dpm_cli, "prune", prune)
    ended = dpm("prune", "model.pt", "-r", "digits")
    assert (ended.code, ended.out, ended.err) == (3, "", "error: target macs cannot be met\n")


def test_quiet_keeps_the_table(dpm: Any, stand_in: Any, report: Report) -> None:
    stand_in("prune", report)
    ended = dpm("prune", "model.pt", "-r", "digits", "-q")
    assert "125.7 M" in ended.out
    assert "working" not in ended.err


def test_train_starts_from_scratch_or_from_a_file(dpm: Any, stand_in: Any) -> None:
    recorder = stand_in("train", TRAINED)
    ended = dpm("train", "--recipe", "digits", "--seed", 4)
    assert ended.code == 0
    assert recorder.given[0].seed == 4  # type: ignore[attr-defined]
    assert (recorder.options["model"], recorder.options["output"]) == (None, Path("model.pt"))
    assert "98.87 %" in ended.out
    dpm("train", "earlier.pt", "-r", "digits", "-o", "next.pt")
    assert (recorder.options["model"], recorder.options["output"]) == (Path("earlier.pt"), Path("next.pt"))
    assert json.loads(dpm("train", "-r", "digits", "--json").out) == TRAINED.to_dict()


def test_evaluate_shows_what_is_known_of_a_file(dpm: Any, stand_in: Any) -> None:
    stand_in("evaluate", EVALUATED)
    ended = dpm("evaluate", "model.onnx", "-r", "digits")
    assert "98.87 %" in ended.out
    assert "latency, ONNX Runtime" in ended.out
    assert json.loads(dpm("evaluate", "model.onnx", "-r", "digits", "--json").out) == EVALUATED.to_dict()


def test_evaluate_shows_batches_and_odd_widths(dpm: Any, stand_in: Any) -> None:
    batches = {"torch": BatchMilliseconds(4.0, 3.9, 4.1, batch=32)}
    recorder = stand_in("evaluate", replace(EVALUATED, latency_in_batches=batches, odd_widths={"conv1": 33}))
    ended = dpm("evaluate", "slim.pt", "-r", "digits", "--batch", 32)
    assert recorder.options["latency_batch"] == 32
    assert "batches of 32, 8000 images/s" in ended.out
    assert "Not a multiple of 8 wide: conv1 (33)." in " ".join(ended.out.split())


def test_export_makes_both_formats_unless_told(dpm: Any, stand_in: Any) -> None:
    made = ExportedFile("onnx", "there/model.onnx", 142_229, 2.4e-7)
    recorder = stand_in("export_slim", [made])
    ended = dpm("export", "slim.pt")
    assert recorder.options["formats"] == ["torchscript", "onnx"]
    assert ended.out == "there/model.onnx  142.2 KB, agrees with the slim model to 2e-07\n"
    ended = dpm("export", "slim.pt", "--format", "onnx", "--format", "onnx", "-o", "there", "--json")
    assert (recorder.options["formats"], recorder.options["output"]) == (["onnx"], Path("there"))
    assert recorder.options["opset"] == 18
    assert json.loads(ended.out)["exports"][0]["bytes"] == 142_229


def test_inspect_shows_the_plan(dpm: Any, stand_in: Any) -> None:
    stand_in("inspect", PLAN)
    ended = dpm("inspect", "model.pt", "-r", "digits")
    assert ended.code == 0
    for part in ("conv1", "952.3 K, can be met", "linear: output of the model", "2.12 M", "2.4 %"):
        assert part in ended.out, part
    assert json.loads(dpm("inspect", "model.pt", "-r", "digits", "--json").out) == PLAN.to_dict()


def test_inspect_writes_sensitivities_as_a_table_and_as_csv(dpm: Any, stand_in: Any) -> None:
    recorder = stand_in("inspect", replace(PLAN, sensitivity=SENSITIVITY))
    ended = dpm("inspect", "model.pt", "-r", "digits", "--csv", "worth.csv", "--share", 0.25, "--images", 50)
    assert ended.code == 0
    assert (recorder.options["sensitivity"], recorder.options["images"]) == (0.25, 50)
    assert "−1.00 points" in ended.out
    assert Path("worth.csv").read_text() == (
        "group,layers,units,removed,macs_saved,accuracy,accuracy_change,loss,loss_change\n"
        "conv1,conv1 block1.conv2,32,16,0.125,94.0,-1.0,0.5,0.25\n"
    )
    assert dpm("inspect", "model.pt", "-r", "digits", "--sensitivity").code == 0
    assert recorder.options["sensitivity"] == 0.5
    stand_in("inspect", PLAN)
    assert dpm("inspect", "model.pt", "-r", "digits").code == 0


def test_inspect_of_an_impossible_target_shows_the_plan_and_fails(dpm: Any, stand_in: Any) -> None:
    stand_in("inspect", replace(PLAN, target=PlannedTarget("macs", 0.01, 21_162, is_achievable=False)))
    ended = dpm("inspect", "model.pt", "-r", "digits")
    assert ended.code == 3
    assert "cannot be met" in ended.out
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert "from 50.0 K to just below 2.12 M" in line
    ended = dpm("inspect", "model.pt", "-r", "digits", "--json")
    assert (ended.code, json.loads(ended.out)["target"]["achievable"]) == (3, False)


def test_a_latency_that_cannot_be_met_is_in_milliseconds(dpm: Any, stand_in: Any) -> None:
    costs = {"dense": PLAN.dense | {"latency": 40_000_000}, "lowest": PLAN.lowest | {"latency": 15_000_000}}
    target = PlannedTarget("latency", 12e6, 12_000_000, is_achievable=False)
    stand_in("inspect", replace(PLAN, **costs, target=target))
    line = dpm("inspect", "model.pt", "-r", "digits").err
    assert "target latency 12.0 ms cannot be met: from 15.0 ms to just below 40.0 ms can" in line


def test_inspect_of_a_model_without_units_says_why(dpm: Any, stand_in: Any) -> None:
    costs = {"macs": 9600, "params": 800, "channels": 0}
    kept = (KeptLayer("conv1", "gate-decorator needs a trainable BatchNorm behind every channel"),)
    target = replace(PLAN.target, is_achievable=False)
    stand_in("inspect", replace(PLAN, dense=costs, lowest=costs, groups=(), kept=kept, target=target))
    ended = dpm("inspect", "model.pt", "-r", "digits")
    assert ended.code == 3
    assert "gate-decorator needs a trainable BatchNorm" in ended.out
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert "no unit can be removed" in line


@pytest.fixture
def trained_demo(stand_in: Any, report: Report) -> tuple[Recorder, Recorder]:
    return stand_in("train", TRAINED), stand_in("prune", report)


def test_the_demo_trains_and_prunes_into_its_own_folder(dpm: Any, trained_demo: tuple[Recorder, Recorder]) -> None:
    train, prune = trained_demo
    ended = dpm("demo", "-o", "shown")
    assert ended.code == 0
    assert train.options["output"] == prune.given[0] == Path("shown/dense.pt")
    assert prune.options["output"] == Path("shown")
    assert "125.7 M" in ended.out
    assert dpm("demo", "-o", "shown", "--device", "cuda").code == 0  # a demo's folder may be written again
    assert train.options["device"] == prune.options["device"] == "cuda"
    assert set(json.loads(dpm("demo", "-o", "shown", "--json").out)) >= {"dense", "slim"}


def test_the_demo_leaves_foreign_folders_and_files_alone(
    dpm: Any, trained_demo: tuple[Recorder, Recorder], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for place in ("mine", "file", "file/below"):
        ended = dpm("demo", "-o", place)
        assert ended.code == 2, place
        (line,) = ended.err.splitlines()
        assert place in line
        assert "--output" in line
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert trained_demo[0].given == ()


def test_predict_prints_a_line_for_each_picture(dpm: Any, stand_in: Any) -> None:
    guesses = (Guess("tabby cat", 3, 0.91234), Guess("dog", 1, 0.05))
    predict = stand_in("predict", [Predicted("a.jpg", guesses), Predicted("b.jpg", guesses[:1])])
    ended = dpm("predict", "model.onnx", "a.jpg", "b.jpg", "--top", 2)
    assert ended.out == "a.jpg  tabby cat 91.2 %  dog 5.0 %\nb.jpg  tabby cat 91.2 %\n"
    assert predict.given == (Path("model.onnx"), [Path("a.jpg"), Path("b.jpg")])
    assert predict.options["top"] == 2
    document = json.loads(dpm("predict", "model.onnx", "a.jpg", "--json").out)
    assert document[0]["classes"][1] == {"name": "dog", "index": 1, "probability": 0.05}


def test_predict_tells_of_each_picture_that_cannot_be_read(dpm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = [Predicted("no.jpg", (), "no.jpg is not a file"), Predicted("b.jpg", (Guess("dog", 1, 0.95),))]

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UnreadableError("no.jpg is not a file", predicted=predicted)

    monkeypatch.setattr(dpm_cli, "predict", refuse)
    ended = dpm("predict", "model.onnx", "no.jpg", "b.jpg")
    assert (ended.code, ended.out, ended.err) == (2, "b.jpg  dog 95.0 %\n", "error: no.jpg is not a file\n")
    first, second = json.loads(dpm("predict", "model.onnx", "no.jpg", "b.jpg", "--json").out)
    assert first == {"image": "no.jpg", "error": "no.jpg is not a file"}
    assert second["classes"][0]["name"] == "dog"


def test_each_doubt_about_a_latency_has_a_mark_of_its_own(dpm: Any, stand_in: Any) -> None:
    row = Benchmarked("a.onnx", "onnx", 10, "onnxruntime", 1, 1)
    stand_in("benchmark", [replace(row, doubt="busy"), row, replace(row, file="b.onnx", doubt="wide")])
    out = dpm("benchmark", "a.onnx", "b.onnx").out
    assert re.findall(r"^ *(\S+)  .*(\*\d) *$", out, re.MULTILINE) == [("a.onnx", "*1"), ("b.onnx", "*2")]
    assert re.findall(r"^(\*\d) +(.*)$", out, re.MULTILINE) == [
        ("*1", "may be wrong: busy"),
        ("*2", "may be wrong: wide"),
    ]


@pytest.mark.parametrize(("threads", "is_said"), [(1, True), (2, False)])
def test_benchmark_says_where_faster_is_no_ratio_of_latencies(
    dpm: Any, stand_in: Any, threads: int, is_said: bool
) -> None:
    stand_in("benchmark", [Benchmarked("a.onnx", "onnx", 10, "onnxruntime", 1, threads)])
    assert ("by processor time" in dpm("benchmark", "a.onnx").out) == is_said


@pytest.mark.parametrize(
    ("arch", "way_out"), [("mine:Net", "--arch mine:Net"), (None, "--arch package.module:function")]
)
def test_a_slim_file_of_own_code_names_the_option_of_the_command_line(dpm: Any, arch: str | None, way_out: str) -> None:
    module = build("digits", classes=10, shape=(1, 8, 8))
    metadata = Metadata(10, Framing((1, 8, 8)), (0.5,), (0.25,), arch="digits")
    save_slim(Path("slim.pt"), module, metadata=metadata, recipe="", report={})
    content = torch.load("slim.pt", weights_only=True)
    torch.save(content | {"arch": arch}, "slim.pt")
    for command in (("predict", "slim.pt", __file__), ("export", "slim.pt"), ("benchmark", "slim.pt", "--trust")):
        ended = dpm(*command)
        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert way_out in ended.err

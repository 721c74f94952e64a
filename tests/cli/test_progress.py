"""Progress: one plain line per epoch, round and removal in a pipe; bars on a terminal; all of it on stderr."""

import io
import time
from dataclasses import replace

import pytest

from dpm_cli.cli.lines import describe
from dpm_cli.cli.progress import Lines, follow
from dpm_cli.events import (
    CheckpointWritten,
    Costs,
    Done,
    EpochEnded,
    Event,
    Exported,
    Note,
    PhaseBegan,
    Resumed,
    RoundStarted,
    StageBegan,
    StagePlan,
    Started,
    StepTaken,
    UnitsRemoved,
    Wanted,
    WeightsCut,
    WentBack,
)

START = Started(
    arch="resnet56",
    device="cpu",
    precision="bf16",
    stages=(StagePlan("train", epochs=2, steps=8),),
    round_to=8,
    target=Wanted("macs", limit=59_101_484, dense=125_747_840),
    dense=Costs(macs=125_747_840, params=855_770, channels=1120),
)
EPOCH = EpochEnded(
    stage="train",
    epoch=3,
    epochs=10,
    step=12,
    loss=0.4123,
    validation_accuracy=91.22,
    lr=0.0461,
    images_per_second=512.4,
    waiting_for_data=0.031,
    seconds=1.0,
)
ROUND = RoundStarted(
    stage="train",
    step=0,
    round=1,
    rounds=4,
    chosen=32,
    condemning=False,
    limit=1,
    predicted_macs=90_000_000,
    predicted_params=600_000,
)
REMOVED = UnitsRemoved(
    stage="train",
    round=1,
    step=4,
    removed=30,
    released=2,
    macs=91_000_000,
    params=610_000,
    units=1090,
    difference=1e-7,
)
BACK = WentBack("train", 9, "round 2", validation_accuracy=88.0, floor=90.5, macs=91_000_000, params=610_000, units=9)
CUT = WeightsCut(0.5, 0.498, 1_800_000, dense=93.5, cut=91.0, recovered=92.0, recalibrated=None, file="out/slim.pt")
STEP = StepTaken(stage="train", step=4, steps=8, epoch=1, epochs=2)
EVENTS = [
    START,
    Resumed(stage="train", step=4, path="out/checkpoint.pt", before=0),
    StageBegan("train"),
    ROUND,
    STEP,
    REMOVED,
    EPOCH,
    CheckpointWritten(step=4, path="out/checkpoint.pt"),
    Note("[odd] text"),
    Exported(format="onnx", path="out/model.onnx", max_difference=3e-7),
    PhaseBegan("measure", "measuring latency"),
    Done(),
]


class OfALaterVersion(Event):
    kind = "of a later version"


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (START, "resnet56  125.7 M MACs  855.8 K parameters  1120 units  target macs ≤ 59.1 M  cpu bf16"),
        (EPOCH, "train 3/10  loss 0.412  validation 91.2 %  lr 0.046  512 images/s  waiting for data 3 %"),
        (
            replace(EPOCH, validation_accuracy=None),
            "train 3/10  loss 0.412  lr 0.046  512 images/s  waiting for data 3 %",
        ),
        (ROUND, "round 1/4  32 units start to decay  leads to 90.0 M MACs, 600.0 K parameters"),
        (REMOVED, "round 1  30 units removed, 2 released  now 91.0 M MACs, 610.0 K parameters"),
        (STEP, None),
        (OfALaterVersion(), None),
        (
            replace(START, arch=None, target=Wanted("sparsity", asked=(0.5, 0.9))),
            "model  125.7 M MACs  855.8 K parameters  1120 units  target sparsity 0.5, 0.9  cpu bf16",
        ),
        (
            replace(START, target=Wanted("macs and latency", asked=(0.5, 12e6))),
            "resnet56  125.7 M MACs  855.8 K parameters  1120 units  target macs and latency 0.5, 12.0 ms  cpu bf16",
        ),
        (
            BACK,
            "round 2 broke the accuracy floor: validation 88.00 % is below 90.50 %  "
            "back to 91.0 M MACs, 610.0 K parameters",
        ),
        (CUT, "cut to sparsity 0.498  1.80 MB  trained 93.50 %  cut 91.00 %  recovered 92.00 %"),
    ],
)
def test_an_event_is_one_line(event: Event, line: str | None) -> None:
    assert describe(event) == line


def test_a_round_beyond_the_planned_ones_says_what_for() -> None:
    line = describe(replace(ROUND, round=5))
    assert line is not None
    assert "to meet the target" in line


def test_a_round_that_lasts_says_when_units_decay() -> None:
    line = describe(replace(ROUND, rounds=1, chosen=0, condemning=True))
    assert line == "round 1/1  units start to decay as soon as they are condemned"


def test_lines_in_a_pipe_are_plain_and_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with follow(quiet=False, as_json=False) as tell:
        for event in EVENTS:
            tell(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert len(err.splitlines()) == 7  # no line for stage, step, checkpoint, a short phase and done
    assert "[odd] text" in err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with follow(quiet=True, as_json=False) as tell:
        for event in EVENTS:
            tell(event)
    assert capsys.readouterr() == ("", "")


def test_what_libraries_print_does_not_reach_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with follow(quiet=True, as_json=True):
        print("chatter")
    assert capsys.readouterr() == ("", "chatter\n")


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_has_gone_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ClosedPipe()
    monkeypatch.setattr("sys.stderr", stream)
    with follow(quiet=False, as_json=False) as tell:
        tell(EPOCH)
    assert stream.getvalue() == ""


def test_lines_of_epochs_say_how_long_the_run_has_taken_and_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    lines = Lines(lambda: now[0])
    stages = (StagePlan("tick", 1, 2), StagePlan("tock", 1, 4), StagePlan("tick", 1, 2), StagePlan("finetune", 2, 8))
    lines.show(replace(START, stages=stages))
    now[0] = 110.0  # loading and analysis
    for stage in stages:
        lines.show(StageBegan(stage.name))
        for step in range(1, stage.steps + 1):
            now[0] += 10.0
            lines.show(replace(STEP, stage=stage.name, step=step, steps=stage.steps))
        lines.show(replace(EPOCH, stage=stage.name))
    ends = [line.rpartition("  ")[2] for line in capsys.readouterr().err.splitlines()[1:]]
    assert ends == [
        "elapsed 30 s, 2 min 20 s of training left",
        "elapsed 1 min 10 s, 1 min 40 s of training left",
        "elapsed 1 min 30 s, 1 min 20 s of training left",
        "elapsed 2 min 50 s",
    ]


def test_a_resumed_run_counts_its_own_steps_only(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    lines = Lines(lambda: now[0])
    lines.show(replace(START, stages=(StagePlan("train", 2, 8),)))
    lines.show(StageBegan("train"))
    now[0] = 10.0
    lines.show(replace(STEP, step=7, steps=8))
    lines.show(EPOCH)
    assert "elapsed 10 s, 10 s of training left" in capsys.readouterr().err


def test_training_without_a_plan_knows_the_steps_of_its_stage(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    lines = Lines(lambda: now[0])
    lines.show(StageBegan("dense"))
    now[0] = 6.0
    lines.show(replace(STEP, stage="dense", step=1, steps=3))
    lines.show(replace(EPOCH, stage="dense"))
    assert "elapsed 6 s, 12 s of training left" in capsys.readouterr().err


def test_a_phase_is_told_in_a_pipe_only_if_it_lasts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpm_cli.cli.progress.PATIENCE", 0.05)
    with follow(quiet=False, as_json=False) as tell:
        tell(PhaseBegan("load", "loading the images"))
        time.sleep(0.3)
        tell(PhaseBegan("analyse", "analysing the model"))
        tell(Done())
        tell(PhaseBegan("measure", "never told"))
    time.sleep(0.1)
    assert capsys.readouterr().err == "loading the images\n"

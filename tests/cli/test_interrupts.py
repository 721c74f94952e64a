"""Ctrl-C and SIGTERM: wait for a checkpoint while training, stop at once otherwise or at the second signal."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dpm_cli
from dpm_cli.cli.interrupts import Stop, stop_between_steps
from dpm_cli.errors import Interrupted
from dpm_cli.events import CheckpointWritten, StepTaken

STEP = StepTaken(stage="train", step=1, steps=4, epoch=1, epochs=1)
LAST_STEP = replace(STEP, step=4)
CHECKPOINT = CheckpointWritten(step=4, path="out/checkpoint.pt")


def test_a_signal_before_training_stops_at_once() -> None:
    with stop_between_steps(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_training_is_remembered_and_a_second_stops_at_once(number: signal.Signals, code: int) -> None:
    with stop_between_steps() as stop:
        stop.watch(STEP)
        assert not stop.is_wanted()
        signal.raise_signal(number)
        assert stop.is_wanted()
        assert stop.exit_code == code
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_a_signal_during_the_last_checkpoint_of_a_stage_waits_for_it() -> None:
    stop = Stop()
    stop.watch(LAST_STEP)
    stop.receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop.watch(CHECKPOINT)


def test_a_signal_after_training_stops_at_once() -> None:
    stop = Stop()
    stop.watch(LAST_STEP)
    stop.watch(CHECKPOINT)
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT, None)


def test_a_checkpoint_on_the_way_does_not_end_the_patience() -> None:
    stop = Stop()
    stop.watch(STEP)
    stop.watch(CHECKPOINT)
    stop.receive(signal.SIGTERM, None)
    assert stop.is_wanted()


def test_earlier_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_between_steps():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def run_until_stopped(number: signal.Signals) -> Callable[..., None]:
    """A stand-in for `dpm_cli.prune` that gets a signal while it trains."""

    def prune(model: object, recipe: object, *, on_event: Any, should_stop: Any, **_: object) -> None:
        on_event(STEP)
        signal.raise_signal(number)
        on_event(STEP)
        if code := should_stop():
            raise Interrupted("stopped in stage train at step 1; continue with --resume", code)

    return prune


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_prune_stops_between_steps(
    dpm: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr(dpm_cli, "prune", run_until_stopped(number))
    ended = dpm("prune", "model.pt", "-r", "digits", "--json")
    assert json.loads(ended.out)["exit_code"] == ended.code == code
    assert [line for line in ended.err.splitlines() if "second Ctrl-C" in line]
    assert ended.err.endswith("error: stopped in stage train at step 1; continue with --resume\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("DataLoader worker (pid 7) exited unexpectedly")])
def test_a_hard_stop_says_whether_there_is_something_to_resume(
    dpm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    def prune(*_: object, on_event: Any, **__: object) -> None:
        on_event(STEP)
        signal.raise_signal(signal.SIGINT)
        raise error

    monkeypatch.setattr(dpm_cli, "prune", prune)
    ended = dpm("prune", "model.pt", "-r", "digits", "--quiet")
    assert (ended.code, ended.err) == (130, "error: stopped at once; nothing was saved yet\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pt").touch()
    assert "--resume" in dpm("prune", "model.pt", "-r", "digits", "--quiet").err


def test_a_dead_worker_without_a_signal_is_not_hidden(dpm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def prune(*_: object, **__: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")

    monkeypatch.setattr(dpm_cli, "prune", prune)
    ended = dpm("prune", "model.pt", "-r", "digits", "--quiet")
    assert ended.code == 1
    assert ended.err.startswith("internal error: RuntimeError: DataLoader worker")

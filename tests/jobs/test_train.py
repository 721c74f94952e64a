"""`dpm train`: from scratch and from a file, interrupted and killed, alone and in several processes."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from digits_recipe import recipe
from killed import start_killed

import dpm_cli
from dpm_cli.data.digits import read_digits
from dpm_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from dpm_cli.errors import DataError, Interrupted, ModelFileError, OutputError, RecipeError, RunError
from dpm_cli.models import build
from dpm_cli.run.course import Course


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def weights_of(path):
    return torch.load(path, weights_only=True)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def stop_after(steps):
    """True after so many training steps."""
    taken = iter(range(1, 10**9))
    return lambda: next(taken) == steps


# ------------------------------------------------------------------------------------------------------- to the end


def test_training_writes_a_model_that_can_be_pruned(tmp_path):
    path, told = tmp_path / "model.pt", []
    result = dpm_cli.train(recipe(dense={"epochs": 2}), output=path, on_event=told.append)
    assert result.path == str(path)
    assert result.bytes == path.stat().st_size
    assert [event.epoch for event in told if event.kind == "epoch"] == [1, 2]
    evaluated = dpm_cli.evaluate(path, recipe(), latency=False)
    assert evaluated.kind == "dense"
    assert evaluated.accuracy == result.accuracy
    assert evaluated.loss == pytest.approx(result.loss, rel=1e-5)
    with pytest.raises(OutputError, match="exists"):
        dpm_cli.train(recipe(), output=path)
    before, more = path.read_bytes(), tmp_path / "more.pt"
    for _ in range(2):
        dpm_cli.train(recipe(train={"epochs": 1}), output=more, model=path, overwrite=True)
    assert before == path.read_bytes() != more.read_bytes()


def test_the_folder_of_a_model_is_made(tmp_path):
    result = dpm_cli.train(recipe(train={"epochs": 1}), output=tmp_path / "new" / "sub" / "model.pt")
    assert (tmp_path / "new" / "sub" / "model.pt").stat().st_size == result.bytes


def test_refused_training_leaves_no_new_folder(tmp_path):
    with pytest.raises(ModelFileError):
        dpm_cli.train(recipe(), output=tmp_path / "new" / "sub" / "model.pt", model=tmp_path / "absent.pt")
    assert not any(tmp_path.iterdir())


def test_a_folder_in_place_of_the_model_is_called_one(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(OutputError, match="photos is a folder"):
        dpm_cli.train(recipe(), output=tmp_path / "photos")


def test_training_twice_gives_the_same_bits(tmp_path):
    for name in "ab":
        torch.manual_seed(ord(name))
        dpm_cli.train(recipe(train={"epochs": 1, "mixup": 0.2}), output=tmp_path / f"{name}.pt")
    assert_same_bits(*(weights_of(tmp_path / f"{name}.pt") for name in "ab"))


@pytest.mark.parametrize("section", ["train", "dense"])
def test_diverging_training_writes_nothing(tmp_path, section):
    settings = recipe(**{section: {"epochs": 30, "lr": 10, "momentum": 0.99, "weight_decay": 50}})
    said = (
        rf"not finite in stage dense (at|before) step \d+: lower {section}\.lr or set {section}\.clip_grad; "
        "no checkpoint was written yet"
    )
    with pytest.raises(RunError, match=said):
        dpm_cli.train(settings, output=tmp_path / "model.pt")
    assert not any(tmp_path.iterdir())


def test_diverging_training_leaves_a_checkpoint_that_did_not(tmp_path):
    fast = {"epochs": 30, "lr": 10, "momentum": 0.99, "weight_decay": 50}
    settings = recipe(train=fast, checkpoint={"every": 1})
    path = tmp_path / "model.checkpoint.pt"
    with pytest.raises(RunError, match=r"the last good checkpoint is .*model\.checkpoint\.pt"):
        dpm_cli.train(settings, output=tmp_path / "model.pt")
    assert names_in(tmp_path) == ["model.checkpoint.previous.pt", "model.checkpoint.pt"]
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(path).state["parts"]["trainee"]["model"].values())


# ------------------------------------------------------------------------------------------------------------ resume

PER_EPOCH, STEPS = 3, 9  # of 128 images, 12 for validation
VARIANTS = {
    "momentum": {"mixup": 0.2},
    "nesterov": {"nesterov": True, "schedule": "multistep", "clip_grad": 1.0},
    "adamw": {"optimizer": "adamw", "lr": 0.005, "mixup": 0.4, "label_smoothing": 0.1, "warmup_epochs": 1},
}


def settings_of(variant="momentum", **changes):
    return recipe(**{"train": {"epochs": 3} | VARIANTS[variant], "checkpoint": {"every": 2}} | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Variant -> the file, the result and the epochs of an uninterrupted training."""
    made = {}

    def train(variant="momentum"):
        if variant not in made:
            path, events = tmp_path_factory.mktemp("whole") / "model.pt", []
            result = dpm_cli.train(settings_of(variant), output=path, on_event=events.append)
            made[variant] = path, result, timeless_epochs(events)
        return made[variant]

    return train


def timeless_epochs(events):
    """What two trainings that do the same must agree on."""
    return [
        replace(event, seconds=0.0, images_per_second=0.0, waiting_for_data=0.0)
        for event in events
        if event.kind == "epoch"
    ]


def interrupt(path, after, settings=None, **more):
    """Stop a training after so many steps."""
    with pytest.raises(Interrupted, match=r"stopped in stage dense at step \d+; continue with --resume"):
        dpm_cli.train(settings or settings_of(), output=path, should_stop=stop_after(after), **more)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stops", [[1], [4], [PER_EPOCH, PER_EPOCH], [2, 1, 4], [1] * (STEPS - 1)])
@pytest.mark.every(3)
def test_stopped_training_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, whole, variant, stops):
    """At the first step, within an epoch, at the ends of epochs, after every single step."""
    path, settings, events = tmp_path / "model.pt", settings_of(variant), []
    for attempt, steps in enumerate(stops):
        interrupt(path, steps, settings, resume=attempt > 0, on_event=events.append)
        assert load_checkpoint(tmp_path / "model.checkpoint.pt").state["step"] == sum(stops[: attempt + 1])
        assert not path.exists()
    torch.manual_seed(12345)  # whatever the caller's dice say
    result = dpm_cli.train(settings, output=path, resume=True, on_event=events.append)
    assert [event.step for event in events if event.kind == "resumed"] == np.cumsum(stops).tolist()
    assert [event.step for event in events if event.kind == "step"] == [*range(1, STEPS + 1)]
    uninterrupted, expected, epochs = whole(variant)
    assert_same_bits(weights_of(path), weights_of(uninterrupted))
    assert timeless_epochs(events) == epochs
    assert replace(result, path="", seconds=0.0) == replace(expected, path="", seconds=0.0)
    assert names_in(tmp_path) == ["model.pt"]


def test_seconds_are_those_of_all_sessions(tmp_path):
    path = tmp_path / "model.pt"
    interrupt(path, 2)
    checkpoint = tmp_path / "model.checkpoint.pt"
    state = load_checkpoint(checkpoint).state
    save_checkpoint(checkpoint, state | {"seconds": {"dense": 1000.0}})
    assert 1000 < dpm_cli.train(settings_of(), output=path, resume=True).seconds < 1100


@pytest.mark.thorough
def test_training_from_a_file_is_resumed_too(tmp_path, whole):
    start, _, _ = whole("adamw")
    for name, stops in (("whole", []), ("stopped", [4])):
        for steps in stops:
            interrupt(tmp_path / f"{name}.pt", steps, model=start)
        dpm_cli.train(settings_of(), output=tmp_path / f"{name}.pt", model=start, resume=bool(stops))
    assert names_in(tmp_path) == ["stopped.pt", "whole.pt"]
    assert_same_bits(*(weights_of(tmp_path / name) for name in names_in(tmp_path)))
    assert not torch.equal(weights_of(tmp_path / "whole.pt")["conv1.weight"], weights_of(whole()[0])["conv1.weight"])


def test_signal_gives_its_exit_code(tmp_path):
    with pytest.raises(Interrupted) as stopped:
        dpm_cli.train(settings_of(), output=tmp_path / "model.pt", should_stop=lambda: 143)
    assert stopped.value.exit_code == 143


def test_resuming_before_the_first_checkpoint_says_so_and_starts_anew(tmp_path, whole):
    path, events = tmp_path / "model.pt", []
    dpm_cli.train(settings_of(), output=path, resume=True, on_event=events.append)
    (note, *_) = [event for event in events if event.kind != "phase"]
    assert note.kind == "note"
    assert "no checkpoint" in note.text
    assert_same_bits(weights_of(path), weights_of(whole()[0]))


def test_damaged_checkpoint_is_passed_over_and_noted(tmp_path, whole):
    path, newest, events = tmp_path / "model.pt", tmp_path / "model.checkpoint.pt", []
    interrupt(path, 5)
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    dpm_cli.train(settings_of(), output=path, resume=True, on_event=events.append)
    assert [event.step for event in events if event.kind == "resumed"] == [4]
    assert any(f"{newest} was damaged" in event.text for event in events if event.kind == "note")
    assert_same_bits(weights_of(path), weights_of(whole()[0]))
    assert names_in(tmp_path) == ["model.pt"]


def refuse(path, match, settings=None, **more):
    """Refused in one line, and nothing has changed."""
    before = {each.name: each.read_bytes() for each in path.parent.iterdir()}
    with pytest.raises(OutputError, match=match) as refusal:
        dpm_cli.train(settings or settings_of(), output=path, **more)
    assert "\n" not in str(refusal.value)
    assert {each.name: each.read_bytes() for each in path.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"epochs": 3, "mixup": 0.2, "lr": 0.06}}, r"lr: 0\.05 there, lr: 0\.06 here"),
        ({"train": {"epochs": 4, "mixup": 0.2}}, "epochs: 3 there, epochs: 4 here"),
        ({"seed": 1}, "seed: 0 there, seed: 1 here"),
        ({"dense": {"epochs": 3}}, "dense: null there, dense: here"),
    ],
)
@pytest.mark.thorough
def test_resume_with_another_recipe_is_refused(tmp_path, whole, change, said):
    path = tmp_path / "model.pt"
    interrupt(path, 2)
    refuse(path, rf"made with another recipe \({said}\): resume with the same one", settings_of(**change), resume=True)
    dpm_cli.train(settings_of(), output=path, resume=True)
    assert_same_bits(weights_of(path), weights_of(whole()[0]))


@pytest.mark.parametrize("what", ["labels", "pixels"])
def test_resume_with_other_data_is_refused(tmp_path, monkeypatch, what):
    path = tmp_path / "model.pt"
    interrupt(path, 2)
    train, test = read_digits()
    if what == "labels":
        train.labels[:] = train.labels.roll(1)
    else:
        train.pixels[:, 0, 0, 0] += 1
    monkeypatch.setattr("dpm_cli.data.digits.read_digits", lambda: (train, test))
    refuse(path, r"made with other data \(training images: \d+ images, but not the same\): resume with", resume=True)


def test_resume_from_another_model_is_refused(tmp_path, whole):
    path = tmp_path / "model.pt"
    interrupt(path, 2)
    refuse(path, "made from another model file: resume with the same", resume=True, model=whole()[0])


# --------------------------------------------------------------------------------------- nothing is lost by accident


def test_unfinished_training_is_resumed_or_replaced_but_never_by_accident(tmp_path, whole):
    path = tmp_path / "model.pt"
    interrupt(path, 5)
    said = r"model\.checkpoint\.pt is of an unfinished training: --resume continues it, --overwrite starts anew"
    refuse(path, said)
    refuse(path, "give one of them", resume=True, overwrite=True)
    (tmp_path / "model.checkpoint.pt").replace(tmp_path / "model.checkpoint.previous.pt")  # killed between two renames
    refuse(path, said)
    events = []
    dpm_cli.train(settings_of(), output=path, overwrite=True, on_event=events.append)
    assert [event.step for event in events if event.kind == "step"] == [*range(1, STEPS + 1)]
    assert_same_bits(weights_of(path), weights_of(whole()[0]))
    assert names_in(tmp_path) == ["model.pt"]


def test_finished_training_is_only_replaced_on_request(tmp_path, whole):
    path = tmp_path / "model.pt"
    path.write_bytes(whole()[0].read_bytes())
    refuse(path, r"model\.pt exists: choose another --output, or --overwrite to replace it")
    refuse(path, r"model\.pt exists and no training of it is unfinished: use it, or --overwrite", resume=True)
    seen = []
    dpm_cli.train(
        settings_of("adamw"), output=path, overwrite=True, on_event=lambda event: seen.append(path.read_bytes())
    )
    assert set(seen) == {whole()[0].read_bytes()}  # to the end, the old model is there
    assert_same_bits(weights_of(path), weights_of(whole("adamw")[0]))


def test_training_stopped_between_its_model_and_its_checkpoints_is_resumed(tmp_path, whole, monkeypatch):
    path, told = tmp_path / "model.pt", []
    with monkeypatch.context() as patch:
        patch.setattr(Course, "forget", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dpm_cli.train(settings_of(), output=path)
    assert names_in(tmp_path) == ["model.checkpoint.previous.pt", "model.checkpoint.pt", "model.pt"]
    refuse(path, "exists")
    dpm_cli.train(settings_of(), output=path, resume=True, on_event=lambda event: told.append(event.kind))
    assert [kind for kind in told if kind not in ("phase", "note")] == ["resumed"]
    assert_same_bits(weights_of(path), weights_of(whole()[0]))
    assert names_in(tmp_path) == ["model.pt"]


def interrupted(course):
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", [1, 4])  # before the first checkpoint, and after it
@pytest.mark.parametrize("settings", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.every(3)
def test_a_second_training_of_the_same_file_is_refused_and_harms_nothing(tmp_path, whole, settings, when):
    path, refusals = tmp_path / "model.pt", []

    def disturb(event):
        if event.kind == "step" and event.step == when and not refusals:
            with pytest.raises(OutputError, match=r"in use by process .*: wait until that run is over") as refusal:
                dpm_cli.train(settings_of(), output=path, **settings)
            refusals.append(refusal)
            assert ".dpm-lock-model" in names_in(tmp_path)

    dpm_cli.train(settings_of(), output=path, on_event=disturb)
    assert refusals
    assert_same_bits(weights_of(path), weights_of(whole()[0]))
    assert names_in(tmp_path) == ["model.pt"]


def test_a_file_with_the_same_checkpoints_is_not_trained_at_once(tmp_path, whole):
    path, refusals = tmp_path / "model.pt", []

    def disturb(event):
        if event.kind == "step" and event.step == 4:
            with pytest.raises(OutputError, match="in use by process") as refusal:
                dpm_cli.train(settings_of(), output=path.with_suffix(".pth"), overwrite=True)
            refusals.append(refusal)

    dpm_cli.train(settings_of(), output=path, on_event=disturb)
    assert refusals
    assert_same_bits(weights_of(path), weights_of(whole()[0]))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data": {"name": "folder", "root": "absent"}}, DataError),
        ({"model": {"arch": "nothing"}}, RecipeError),
    ],
)
def test_overwriting_training_that_cannot_begin_costs_no_checkpoint(tmp_path, whole, change, error):
    path = tmp_path / "model.pt"
    interrupt(path, 5)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    with pytest.raises(error):
        dpm_cli.train(settings_of(**change), output=path, overwrite=True)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    dpm_cli.train(settings_of(), output=path, resume=True)
    assert_same_bits(weights_of(path), weights_of(whole()[0]))


@pytest.mark.thorough
def test_two_files_of_one_folder_can_be_trained_at_once(tmp_path, whole):
    started = []

    def train_another(event):
        if event.kind == "step" and event.step == 4:
            started.append(event)
            dpm_cli.train(settings_of(), output=tmp_path / "other.pt")

    dpm_cli.train(settings_of(), output=tmp_path / "model.pt", on_event=train_another)
    assert started
    assert names_in(tmp_path) == ["model.pt", "other.pt"]
    for name in names_in(tmp_path):
        assert_same_bits(weights_of(tmp_path / name), weights_of(whole()[0]))


def test_leftovers_of_a_killed_training_go_and_those_of_others_stay(tmp_path):
    ours = [".model-0123abcd.pt", ".model.checkpoint-ffffffff.pt"]
    foreign = [".model-mine.pt", ".other-0123abcd.pt", "other.checkpoint.pt", ".dpm-lock"]
    for name in ours + foreign:
        (tmp_path / name).touch()
    dpm_cli.train(settings_of(), output=tmp_path / "model.pt")
    assert names_in(tmp_path) == sorted([*foreign, "model.pt"])


# ------------------------------------------------------------------------------------------------------------ killed

MOST = {"event": 14, "half": 70, "rename": 8, "flush": 8}  # so that no training reaches its end before it is killed


def kill_and_resume(folder, moments, *, epochs, seed):
    """Kill a training at these moments, each time a random number of them later, and let it end: same bits, tidy."""
    settings = settings_of(train={"epochs": epochs, "mixup": 0.2})
    whole, killed = folder / "whole" / "model.pt", folder / "killed" / "model.pt"
    for path in (whole, killed):
        path.parent.mkdir()
    dpm_cli.train(settings, output=whole)
    dice, kills = np.random.default_rng(seed), []
    for moment in dice.permutation(moments).tolist():
        number = int(dice.integers(2, MOST[moment]))
        code = start_killed("train", settings, output=killed, moment=moment, number=number)
        kills.append((moment, number, code))
    assert [code for *_, code in kills] == [-signal.SIGKILL] * len(moments), kills
    assert start_killed("train", settings, output=killed) == 0
    assert_same_bits(weights_of(killed), weights_of(whole))
    assert names_in(killed.parent) == ["model.pt"]  # no checkpoint, no lock, nothing half-written


@pytest.mark.thorough
def test_training_killed_at_three_random_moments_ends_with_the_same_bits(tmp_path):
    kill_and_resume(tmp_path, ["event", "half", "rename"], epochs=10, seed=0)


@pytest.mark.slow
def test_training_killed_at_ten_random_moments_ends_with_the_same_bits(tmp_path):
    kill_and_resume(tmp_path, [*["event"] * 4, *["half"] * 2, *["rename"] * 2, *["flush"] * 2], epochs=40, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["rename", "flush"])
def test_training_killed_while_it_writes_its_model_ends_with_the_same_bits(tmp_path, whole, moment):
    settings, path, number = settings_of(checkpoint={"every": 100}), tmp_path / "model.pt", 0
    while True:  # later and later: the checkpoint, the model
        number += 1
        for old in tmp_path.iterdir():
            old.unlink()
        code = start_killed("train", settings, output=path, moment=moment, number=number)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert start_killed("train", settings, output=path) == 0
        assert_same_bits(weights_of(path), weights_of(whole()[0]))
        assert names_in(tmp_path) == ["model.pt"]
    assert number > 2


# -------------------------------------------------------------------------------------------------- several processes

# Rank `who` wants to stop after `when` steps. All print what they return, or end with the exit code of why they do not.
TRAIN = """
    import itertools, json, os, sys, torch
    import dpm_cli
    from dpm_cli.errors import Interrupted, ToldElsewhere

    torch.set_num_threads(1)
    settings, path, who, when, resume = sys.argv[1:]
    count = itertools.count(1)

    def should_stop():
        return next(count) == int(when) and os.environ["RANK"] == who

    try:
        trained = dpm_cli.train(
            json.loads(settings), output=path, device="cpu", resume=resume == "resume", should_stop=should_stop
        )
        print(json.dumps(trained.to_dict()))
    except (Interrupted, ToldElsewhere) as stopped:
        sys.exit(stopped.exit_code)
"""
TOGETHER = settings_of(data={"batch": 33}, train={"epochs": 4, "mixup": 0.2, "lr": 0.02})


def train_together(together, path, *, who=0, when=0, resume=False):
    """Two processes. Returns their exit codes and what they printed."""
    ended = together(TRAIN, json.dumps(TOGETHER), path, who, when, "resume" if resume else "anew")
    assert not any("Traceback" in said for *_, said in ended), ended
    return [code for code, *_ in ended], [said for _, said, _ in ended]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "model.pt"
    return path, dpm_cli.train(TOGETHER, output=path)


def assert_nearly_same(path, other):
    """Not the running statistics, which make much of a rounding error."""
    weights = []
    for each in (path, other):
        model = build("digits", classes=10, shape=(1, 8, 8))
        model.load_state_dict(weights_of(each))
        weights.append(dict(model.named_parameters()))
    torch.testing.assert_close(*weights, rtol=0.02, atol=0.02)
    assert np.ptp(weights[0]["conv1.weight"].detach().numpy()) > 0.4  # far more than the tolerance


@pytest.mark.thorough
def test_two_processes_train_nearly_the_weights_of_one(together, alone, tmp_path):
    path = tmp_path / "model.pt"
    codes, printed = train_together(together, path)
    assert codes == [0, 0]
    assert printed[0] == printed[1]  # all know the result
    result = json.loads(printed[0])
    assert (result["path"], result["epochs"], result["params"]) == (str(path), 4, alone[1].params)
    assert result["loss"] == pytest.approx(alone[1].loss, rel=0.05)
    assert_nearly_same(path, alone[0])
    assert names_in(tmp_path) == ["model.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_one_process_that_is_stopped_stops_both_and_two_or_one_go_on(together, alone, tmp_path, who):
    uninterrupted, path = tmp_path / "uninterrupted.pt", tmp_path / "model.pt"
    assert train_together(together, uninterrupted)[0] == [0, 0]
    codes, printed = train_together(together, path, who=who, when=5)
    assert (codes, printed) == ([130, 130], ["", ""])
    assert load_checkpoint(tmp_path / "model.checkpoint.pt").state["step"] == 5
    before = {each: (tmp_path / each).read_bytes() for each in names_in(tmp_path)}
    assert train_together(together, path, resume=True)[0] == [0, 0]
    assert_same_bits(weights_of(path), weights_of(uninterrupted))
    path.unlink()
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    dpm_cli.train(TOGETHER, output=path, resume=True)
    assert_nearly_same(path, alone[0])

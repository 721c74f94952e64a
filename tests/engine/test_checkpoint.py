import hashlib
import io
import os
import zipfile

import pytest
import torch

from dpm_cli.engine.checkpoint import (
    MAGIC,
    capture_rng,
    load_checkpoint,
    remove_checkpoints,
    restore_rng,
    save_checkpoint,
)
from dpm_cli.errors import RunError
from dpm_cli.files import CHECKPOINT

PREVIOUS = "checkpoint.previous.pt"


def make_state(step):
    return {"step": step, "weights": {"a": torch.full((3, 2), float(step))}, "names": ["x", 1.5], "rng": capture_rng()}


def save_two(folder):
    for step in (1, 2):
        save_checkpoint(folder / CHECKPOINT, make_state(step))


def test_state_comes_back_as_it_was(tmp_path):
    state = make_state(3)
    save_checkpoint(tmp_path / CHECKPOINT, state)
    loaded = load_checkpoint(tmp_path / CHECKPOINT)
    assert loaded.state["step"] == 3
    assert torch.equal(loaded.state["weights"]["a"], state["weights"]["a"])
    assert loaded.state["names"] == state["names"]
    assert loaded.damaged == ()


def test_the_last_two_are_kept_and_nothing_else(tmp_path):
    for step in range(4):
        save_checkpoint(tmp_path / CHECKPOINT, make_state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, CHECKPOINT]
    assert load_checkpoint(tmp_path / CHECKPOINT).state["step"] == 3
    (tmp_path / CHECKPOINT).unlink()  # as if killed between the two renames
    assert load_checkpoint(tmp_path / CHECKPOINT).state["step"] == 2
    remove_checkpoints(tmp_path / CHECKPOINT)
    assert load_checkpoint(tmp_path / CHECKPOINT) is None


@pytest.mark.parametrize("part", [0.0, 0.001, 0.02, 0.3, 0.6, 0.99])
def test_a_flipped_bit_falls_back(tmp_path, part):
    save_two(tmp_path)
    data = bytearray((tmp_path / CHECKPOINT).read_bytes())
    data[int(part * len(data))] ^= 4
    (tmp_path / CHECKPOINT).write_bytes(data)
    loaded = load_checkpoint(tmp_path / CHECKPOINT)
    assert loaded.state["step"] == 1
    assert loaded.damaged == (tmp_path / CHECKPOINT,)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_falls_back(tmp_path, kept):
    save_two(tmp_path)
    path = tmp_path / CHECKPOINT
    os.truncate(path, int(kept * path.stat().st_size))
    assert load_checkpoint(tmp_path / CHECKPOINT).state["step"] == 1


def test_two_damaged_files_are_one_line(tmp_path):
    save_two(tmp_path)
    for name in (CHECKPOINT, PREVIOUS):
        (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(RunError, match=r"checkpoint\.pt and .*checkpoint\.previous\.pt cannot be read") as caught:
        load_checkpoint(tmp_path / CHECKPOINT)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_never_replaces_the_intact_one_before_it(tmp_path):
    save_two(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"garbage")
    save_checkpoint(tmp_path / CHECKPOINT, make_state(3))
    (tmp_path / CHECKPOINT).write_bytes(b"garbage again")
    assert load_checkpoint(tmp_path / CHECKPOINT).state["step"] == 1


def test_a_failed_write_leaves_both_older_files(tmp_path, monkeypatch):
    save_two(tmp_path)

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError):
        save_checkpoint(tmp_path / CHECKPOINT, make_state(3))
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, CHECKPOINT]
    assert load_checkpoint(tmp_path / CHECKPOINT).state["step"] == 2
    (tmp_path / CHECKPOINT).unlink()
    assert load_checkpoint(tmp_path / CHECKPOINT).state["step"] == 1


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def with_a_right_checksum(data):
    return MAGIC + hashlib.sha256(data).digest() + data


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def zip_bomb():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    return file.getvalue()


@pytest.mark.parametrize("data", [saved({"a": Bomb()}), saved([1, 2]), zip_bomb(), b"", b"PK\x03\x04"])
def test_a_hostile_file_with_a_right_checksum_is_damaged_and_not_run(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(with_a_right_checksum(data))
    with pytest.raises(RunError, match="cannot be read"):
        load_checkpoint(tmp_path / CHECKPOINT)
    assert not (tmp_path / "exploded").exists()


def test_random_numbers_continue_where_they_were(tmp_path):
    save_checkpoint(tmp_path / CHECKPOINT, {"rng": capture_rng()})
    expected = torch.rand(5)
    torch.manual_seed(99)
    restore_rng(load_checkpoint(tmp_path / CHECKPOINT).state["rng"])
    assert torch.equal(torch.rand(5), expected)

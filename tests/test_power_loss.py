"""A disk that forgets: after power loss only what was flushed is there, and a run goes on from it to the same bits."""

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_recipe import recipe

import dpm_cli
from dpm_cli.engine.checkpoint import load_checkpoint
from dpm_cli.errors import RunError
from dpm_cli.events import CheckpointWritten
from dpm_cli.files import CHECKPOINT, REPORT, write_text_atomic
from dpm_cli.jobs.doctor import examine
from dpm_cli.measure import measure_in_turns
from dpm_cli.models import build, load

Contents = dict[str, bytes]
SETTINGS = recipe(checkpoint={"every": 1}, export=["torchscript"])


class ForgetfulDisk:
    """Watches one folder: what would be in it if the power went now.

    A file has the content that it had when it was last flushed; one that never was is empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._flush = os.fsync
        self._flushed: dict[int, bytes] = {}  # by inode
        self._names: dict[str, int] = {}  # as of the last flush of the folder
        self._held: list[int] = []  # open files, so that no other file gets their inode

    def fsync(self, descriptor: int) -> None:
        self._flush(descriptor)
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            if os.path.samestat(found, self.folder.stat()):
                self._names = self._listing()
        else:
            self._flushed[found.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            self._held.append(os.dup(descriptor))

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)

    def _listing(self) -> dict[str, int]:
        return {each.name: each.inode() for each in os.scandir(self.folder) if each.is_file(follow_symlinks=False)}

    def left(self) -> tuple[Contents, Contents]:
        """What would be left if names are kept only by flushing the folder, and if they are kept at once."""
        listings = (self._names, self._listing())
        first, second = ({name: self._flushed.get(inode, b"") for name, inode in each.items()} for each in listings)
        return first, second


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForgetfulDisk]:
    if not Path("/proc/self/fd").exists():
        pytest.skip("only Linux tells what a descriptor is of")
    (tmp_path / "out").mkdir()
    disk = ForgetfulDisk(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", disk.fsync)
    monkeypatch.setattr("dpm_cli.run.delivery.measure_in_turns", partial(measure_in_turns, seconds=0.002))
    monkeypatch.setattr("dpm_cli.jobs.prune.write_page", lambda folder: None)  # tests/display draws it
    yield disk
    disk.close()


def place(contents: Contents, folder: Path) -> Path:
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("digits", classes=10, shape=(1, 8, 8)).eval()


def test_the_disk_forgets(disk: ForgetfulDisk) -> None:
    (disk.folder / "unflushed").write_text("gone")
    write_text_atomic(disk.folder / "whole", "kept")
    (disk.folder / "late").write_text("gone")
    with (disk.folder / "whole").open("a") as file:
        file.write(", and more that was not flushed")
    strict, loose = disk.left()
    assert strict == {"unflushed": b"", "whole": b"kept"}
    assert loose == strict | {"late": b""}


@pytest.mark.thorough
def test_power_may_go_at_any_moment_of_a_run(
    disk: ForgetfulDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments: list[tuple[tuple[int, int], Contents]] = []  # the last checkpoint that was told, what would be left
    told, stage = (0, 0), 0
    replace = os.replace

    def note() -> None:
        moments.extend((told, contents) for contents in disk.left())

    def replacing(*given: Any) -> None:
        note()
        replace(*given)
        note()

    def watch(event: Any) -> None:
        nonlocal told, stage
        note()
        if isinstance(event, CheckpointWritten):
            state = load_checkpoint(disk.folder / CHECKPOINT)
            assert state is not None
            told = (state.state["stage"], state.state["step"])
        note()

    monkeypatch.setattr(os, "replace", replacing)
    dpm_cli.prune(net(), SETTINGS, output=disk.folder, on_event=watch)
    note()
    monkeypatch.setattr(os, "replace", replace)
    whole = load(disk.folder / "slim.pt").state_dict()

    assert len(moments) > 50
    seen: set[tuple[tuple[str, int], ...]] = set()
    distinct: list[Contents] = []
    for told, contents in moments:
        key = tuple(sorted((name, id(content)) for name, content in contents.items() if not name.startswith(".")))
        if key in seen:
            continue
        seen.add(key)
        distinct.append(contents)
        folder = place(contents, tmp_path / f"moment-{len(distinct)}")
        found = examine(folder)
        assert found.problem is None, (found, told)
        if REPORT not in contents and told > (0, 0):
            kept = load_checkpoint(folder / CHECKPOINT)
            assert kept is not None, sorted(contents)
            assert (kept.state["stage"], kept.state["step"]) >= told
    for contents in (distinct[len(distinct) // 3], distinct[-1 - len(distinct) // 4]):
        out = place(contents, tmp_path / f"resumed-{id(contents)}")
        dpm_cli.prune(net(), SETTINGS, output=out, resume=True)
        again = load(out / "slim.pt").state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a handful of files."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=6", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_no_room_for_another_file(few_inodes: Path) -> None:
    with pytest.raises(RunError, match=f"cannot be written: {os.strerror(errno.ENOSPC)}") as error:
        dpm_cli.prune(net(), recipe(checkpoint={"every": 1}), output=few_inodes / "out")
    assert "\n" not in str(error.value)
    left = {path.name for path in (few_inodes / "out").iterdir()}
    assert not [name for name in left if name.startswith(".")]
    kept = load_checkpoint(few_inodes / "out" / CHECKPOINT)
    assert kept is None or kept.state["step"] >= 1

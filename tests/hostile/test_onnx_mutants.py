"""Mutants of ONNX files, opened and run as `dpm evaluate` does it, within the limits that SECURITY.md names.

A stranger's file is opened and run in a process of its own, which takes seconds to start. So here `stranger.main` runs
in forks of this process, which has imported everything: the same code, under the same limits.
"""

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from attack import MEGABYTE, bounded, memory
from test_foreign_onnx import CLASSIFY, loop_for_ever, take, write
from test_mutants import mutate

from dpm_cli.errors import DpmError
from dpm_cli.export import confined, open_exported, stranger
from dpm_cli.export import onnx as onnx_files
from dpm_cli.export.ours_onnx import find_foreign
from dpm_cli.models import build

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
COUNT = 2000
RUNNING = 4096 * MEGABYTE
SLACK = 100 * MEGABYTE  # the stacks of threads, and what Python itself takes for an answer


class Fork:
    """Stands for the `subprocess.Popen` of a stranger's file."""

    latest: "Fork"

    def __init__(self, command: list[str], **_: Any) -> None:
        questions, answers = os.pipe(), os.pipe()
        self.before = memory("VmRSS")
        with warnings.catch_warnings(action="ignore"):  # of threads, which do nothing here
            self.pid = os.fork()
        if not self.pid:
            try:
                os.dup2(questions[0], 0)
                os.dup2(answers[1], 1)
                os.closerange(3, 1000)
                sys.argv = command[3:]  # after the interpreter and its options
                stranger.main()
            finally:
                os._exit(0)
        os.close(questions[0])
        os.close(answers[1])
        self.stdin, self.stdout = os.fdopen(questions[1], "wb"), os.fdopen(answers[0], "rb")
        self.returncode: int | None = None
        self.bytes = 0
        Fork.latest = self

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            pid, status, used = os.wait4(self.pid, options)
            if pid:
                self.returncode, self.bytes = os.waitstatus_to_exitcode(status), 1024 * used.ru_maxrss - self.before
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        ends = time.monotonic() + (timeout or 0)
        while timeout is not None and self.poll() is None:
            if time.monotonic() > ends:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.001)
        return self.poll(0)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@contextmanager
def forking() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confined.subprocess, "Popen", Fork)
        yield


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Ours, the same without our mark, and what a stranger may have written."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sound")
    module = build("digits", classes=10, shape=(1, 8, 8)).eval()
    made = [
        onnx_files.serialise(module, torch.zeros(2, 1, 8, 8), about, opset=18) for about in ({"dpm_recipe": "a"}, {})
    ]
    graphs = [CLASSIFY, loop_for_ever()[1:3] + CLASSIFY, take(1000, folded=True), take(1000, folded=False)]
    return made + [write(folder / "m.onnx", nodes).read_bytes() for nodes in graphs]


def mutate_graph(content: bytes, dice: random.Random) -> bytes:
    """Change a few numbers, sizes, names or kinds of operators, and leave a file that protobuf can read."""
    model = onnx.load_from_string(content)
    graph = model.graph
    for _ in range(dice.randint(1, 4)):
        node = dice.choice(graph.node)
        match dice.randrange(7):
            case 0:
                node.op_type = dice.choice(
                    ["Expand", "Tile", "Loop", "Resize", "Pad", "ConstantOfShape", "Conv", "Gemm"]
                )
            case 1 if node.attribute:
                attribute = dice.choice(node.attribute)
                attribute.i = dice.choice([-1, 0, 2**31, 2**62, -(2**63)])
                attribute.ints[:] = [dice.choice([-1, 0, 1, 2**31, 2**62]) for _ in attribute.ints]
            case 2 if graph.initializer:
                tensor = dice.choice(graph.initializer)
                tensor.dims[:] = [dice.choice([0, 1, -1, 2**20, 2**40, each]) for each in tensor.dims]
            case 3 if node.input:
                node.input[dice.randrange(len(node.input))] = dice.choice(graph.node).output[0]
            case 4:
                graph.node.add().CopyFrom(node)
            case 5:
                sizes = dice.choice(graph.input).type.tensor_type.shape.dim
                dice.choice(sizes).dim_value = dice.choice([0, -1, 1, 2**20, 2**40])
            case _:
                for attribute in node.attribute:
                    if attribute.t.raw_data:
                        attribute.t.raw_data = dice.choice([b"\xff", b"\x7f", b"\x10"]) * len(attribute.t.raw_data)
    return bytes(model.SerializeToString())


def attack(path: Path) -> str:
    """Open, run and cost a file, and close it again. Returns what was said; raises AssertionError past a limit."""
    size, said, opened, is_foreign = path.stat().st_size, "", False, find_foreign(path) is not None
    with bounded(size):  # also this process
        try:
            model = open_exported(path, confined=True, threads=1)
            opened = True
            shape = model.shape or (1, 8, 8)
            if torch.Size(shape).numel() < 1 << 20:
                model.outputs(torch.zeros(2, *shape))
                model.cost(shape)
        except DpmError as error:
            said = str(error)
        model = None
    assert "\n" not in said
    if is_foreign:
        Fork.latest.kill()
        Fork.latest.wait()
        most = 4 * size + 300 * MEGABYTE + SLACK + (RUNNING if opened else 0)
        assert Fork.latest.bytes < most, f"{Fork.latest.bytes / MEGABYTE:.0f} MB: {said}"
    return said


def test_mutants_end_within_the_limits(sound: list[bytes], tmp_path: Path) -> None:
    path, refused = tmp_path / "m.onnx", 0
    with forking():
        for number in range(COUNT):
            dice = random.Random(number)
            change = mutate if number % 2 else mutate_graph
            path.write_bytes(change(sound[number // 2 % len(sound)], dice))
            try:
                refused += bool(attack(path))
            except Exception as error:
                raise AssertionError(f"mutant {number}: {type(error).__name__}: {error}") from error
    assert COUNT // 3 < refused < COUNT


def test_forks_run_what_a_process_of_its_own_runs(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", CLASSIFY)
    with forking():
        assert attack(path) == ""
        assert "takes more time" in attack(write(path, loop_for_ever()))
        assert "fails on images of shape" in attack(write(path, take(1 << 29, folded=True)))

"""`dpm` in processes with limits: a server that has imported everything forks one process for each command.

Run as a script it is that server: a line of JSON comes in for every command, and one goes out.
"""

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MEGABYTE = 1 << 20
MOST_SECONDS = 10


class Answer(NamedTuple):
    """What a command did. `bytes` is the memory that it took over its start; `code` is negative for a signal."""

    code: int
    out: str
    err: str
    bytes: int
    seconds: float


class Attacker:
    """Runs commands in forked processes. Use it as a context."""

    def __enter__(self) -> "Attacker":
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment.pop("DPM_DEBUG", None)
        command = [sys.executable, __file__]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.communicate()  # closes its input, at which it ends

    def run(self, *arguments: object, folder: Path, limit: int = 4 << 30, seconds: int = 120) -> Answer:
        """Run `dpm ARGUMENTS` in a folder. limit: bytes over the start at which memory is refused."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {"arguments": [str(each) for each in arguments], "folder": str(folder), "limit": limit}
        self._server.stdin.write(json.dumps(request | {"seconds": seconds}) + "\n")
        self._server.stdin.flush()
        return Answer(**json.loads(self._server.stdout.readline()))


def assert_held(answer: Answer, size: int, folder: Path) -> None:
    """One line or a result, no traceback, and within the bounds. size: bytes of the file in question."""
    assert answer.code in (0, 1, 2, 3, 4), answer
    assert "Traceback" not in answer.err, answer.err
    assert "internal error" not in answer.err, answer.err
    if answer.code:
        lines = answer.err.splitlines()
        assert lines, answer
        assert lines[-1].startswith("error: "), answer.err
        assert all(line.isprintable() and len(line) < 1500 for line in lines)
        assert answer.bytes < 4 * size + 300 * MEGABYTE, (
            f"{answer.bytes / MEGABYTE:.0f} MB for {size} bytes: {answer.err}"
        )
        assert answer.seconds < MOST_SECONDS, f"{answer.seconds:.1f} s: {answer.err}"
    assert not (folder / "executed").exists()


@contextlib.contextmanager
def bounded(size: int, more: int = 300 * MEGABYTE) -> Iterator[None]:
    """Require that a block takes no more memory and time than the refusal of a file of `size` bytes may."""
    reset_peak()
    before, started = memory("VmRSS"), time.process_time()
    try:
        yield
    finally:  # a refusal is an exception
        took, seconds = memory("VmHWM") - before, time.process_time() - started
        assert took < 4 * size + more, f"{took / MEGABYTE:.0f} MB for {size} bytes"
        assert seconds < MOST_SECONDS, f"{seconds:.1f} s for {size} bytes"


def reset_peak() -> None:
    """Let the peak of this process's memory start here; only Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """Return bytes of this process, as Linux counts them; 0 elsewhere."""
    try:
        found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def _attempt(request: dict[str, Any], place: Path) -> None:
    """In the forked process: run the command, and write what it took. Never returns."""
    from dpm_cli.cli.app import main

    os.chdir(request["folder"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    reset_peak()
    before = memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + request["limit"],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"],) * 2)
    code = 70
    try:
        code = main(request["arguments"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    (place / "bytes").write_text(str(memory("VmHWM") - before))
    os._exit(code)


def _serve() -> None:
    import tempfile

    import torch
    import torchvision  # noqa: F401

    import dpm_cli

    with contextlib.suppress(ImportError):
        import timm  # noqa: F401  # so that its import is not counted

    torch.set_num_threads(1)
    for name in dpm_cli.__all__:
        getattr(dpm_cli, name)
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    import dpm_cli.cli.summaries
    import dpm_cli.cli.tables

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for line in sys.stdin:
            for old in place.iterdir():
                old.unlink()
            process = os.fork()
            if not process:
                _attempt(json.loads(line), place)
            _, status, used = os.wait4(process, 0)
            seconds = used.ru_utime + used.ru_stime  # a busy machine is no fault of the command
            texts = {name: (place / name).read_text(errors="replace") for name in ("out", "err")}
            took = int((place / "bytes").read_text()) if (place / "bytes").exists() else 0
            answer = Answer(os.waitstatus_to_exitcode(status), bytes=took, seconds=seconds, **texts)
            print(json.dumps(answer._asdict()), flush=True)


if __name__ == "__main__":
    _serve()

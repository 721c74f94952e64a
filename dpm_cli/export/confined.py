"""Run a stranger's ONNX file in a process of its own, with limits of memory and time (`stranger.py` is that process).

A graph holds no code, but it may loop for ever and ask for any amount of memory, when it is opened and when it runs.
The two processes speak in frames of JSON and plain numbers, so nothing that comes back is executed either.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dpm_cli.errors import ModelFileError, RunError, UsageError
from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.frames import Broken, TooMuch, read_frame, write_frame
from dpm_cli.layers.images import Shape

ERRORS = {kind.__name__: kind for kind in (ModelFileError, RunError, UsageError)}
WAY_OUT = "--trust (in Python trust=True) runs it without limits, if you trust whoever made it"
PATIENCE = 20  # a limit of processor time passes by the clock after so many times that, on a busy machine
MOST_ANSWER = 256 << 20  # bytes of the outputs for one batch
STARTING = 300.0  # seconds for the process to begin, in which nothing of the file is read


def open_confined(path: Path, runtime: str | None, threads: int | None) -> ExportedModel:
    """Open an ONNX file in a process of its own. Arguments as for `open_exported`; so is what it raises.

    The process ends with the model, or when it passes a limit, which is then told in one line.
    """
    stranger = _Stranger(path, runtime, threads or torch.get_num_threads())
    about, _ = stranger.ask({"do": "open"})
    shape = _parse_shape(about.get("shape"))
    given = about.get("metadata")
    metadata = {key: str(value) for key, value in given.items()} if isinstance(given, dict) else {}
    clocks = [0.0, 0.0]

    def outputs(images: Tensor) -> list[Tensor]:
        answer, arrays = stranger.ask({"do": "run"}, images.detach().cpu().contiguous().float().numpy())
        clocks[:] = (clock + seconds for clock, seconds in zip(clocks, _parse_seconds(answer.get("took"))))
        return [torch.from_numpy(array) for array in arrays]

    def cost(image: Shape) -> tuple[int | None, int | None]:
        found, _ = stranger.ask({"do": "cost", "shape": list(image)})
        return _number(found.get("macs")), _number(found.get("params"))

    return ExportedModel("onnx", path, metadata, shape, outputs, cost, lambda: (clocks[0], clocks[1]))


class _Stranger:
    """Asks the process of one file, and ends it when nobody needs the file any more."""

    def __init__(self, path: Path, runtime: str | None, threads: int) -> None:
        self._path = path
        package = str(Path(__file__).parents[2])
        paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-P", "-m", "dpm_cli.export.stranger", str(path), runtime or "", str(threads)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
        )
        # Unbuffered, so that waiting for the pipe is waiting for the answer.
        self._answers = cast(io.RawIOBase, cast(io.BufferedReader, self._process.stdout).raw)
        self._end = weakref.finalize(self, _end, self._process)
        self._receive(time.monotonic() + STARTING)

    def ask(self, request: Mapping[str, Any], *arrays: "np.ndarray[Any, Any]") -> tuple[dict[str, Any], list[Any]]:
        """Send a request and wait for its answer. Raises what the process raised, or RunError past a limit."""
        seconds = 10.0 + 2.0 * sum(len(array) for array in arrays)  # of processor time, for each thread
        try:
            assert self._process.stdin is not None
            write_frame(self._process.stdin, {**request, "seconds": seconds}, arrays)
        except OSError:
            raise self._gone() from None
        answer, found = self._receive(time.monotonic() + PATIENCE * seconds)
        if (kind := ERRORS.get(str(answer.get("error")))) is not None:
            raise kind(" ".join(str(answer.get("said")).split())[:1000])
        return answer, found

    def _receive(self, deadline: float) -> tuple[dict[str, Any], list[Any]]:
        try:
            return read_frame(self._answers, deadline, most=MOST_ANSWER)
        except TooMuch:
            self._end()
            raise RunError(
                f"{self._path} gives more than {MOST_ANSWER >> 20} MB of outputs for one batch of images: {WAY_OUT}"
            ) from None
        except (Broken, OSError):
            raise self._gone() from None
        except BaseException:
            self._end()
            raise

    def _gone(self) -> RunError:
        """Say why the process is no more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.poll()
        self._end()
        if code is None or code == -getattr(signal, "SIGXCPU", 0):
            return RunError(f"{self._path} takes more time than a file that dpm did not write may: {WAY_OUT}")
        return RunError(
            f"{self._path} ended the process that it ran in, as one does that takes more memory than a file that dpm "
            f"did not write may: {WAY_OUT}"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()


def _parse_shape(value: object) -> Shape | None:
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(size, int) and size > 0 for size in value):
        return None
    return value[0], value[1], value[2]


def _parse_seconds(value: object) -> tuple[float, float]:
    """Return the times by the clock and of the processor; none that a clock cannot show are added to ours."""
    if not isinstance(value, list) or len(value) != 2:
        return 0.0, 0.0
    clock, processor = (float(each) if type(each) in (int, float) and 0 <= each < 1e9 else 0.0 for each in value)
    return clock, processor


def _number(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None

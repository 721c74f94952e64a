"""Be the process that runs a stranger's file for `confined.py`: python -m dpm_cli.export.stranger FILE RUNTIME THREADS.

Its own limits are set before the file is opened, so a file that asks for much ends this process alone.
"""

import contextlib
import os
import re
import sys
from io import FileIO, RawIOBase
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from dpm_cli.errors import DpmError, ModelFileError, RunError, UsageError, one_line
from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.frames import Broken, read_frame, write_frame
from dpm_cli.export.read import read_onnx
from dpm_cli.measure import read_clocks

TIMES, MORE = 4, 300 << 20  # memory to open a file: times its size, plus bytes
RUNNING = 4 << 30  # bytes to run it
STACKS = 24 << 20  # bytes of each thread


def main() -> None:
    path, runtime, threads = Path(sys.argv[1]), sys.argv[2] or None, int(sys.argv[3])
    questions, answers = _take_streams()
    torch.set_num_threads(threads)
    import onnx  # noqa: F401  # what it takes is not the file's fault
    import onnxruntime  # noqa: F401

    write_frame(answers, {"ready": True})
    opening = TIMES * path.stat().st_size + MORE + STACKS * threads
    before = _used("VmData")
    if before:
        _limit_memory(before + opening)
    model: ExportedModel | None = None
    while True:
        try:
            request, arrays = read_frame(questions)
        except Broken:
            return  # nobody needs the file any more
        try:
            _limit_time(float(request["seconds"]) * threads)
            if model is None:
                model = read_onnx(path, runtime, threads)
                _try(model)
                if before:
                    _limit_memory(before + opening + RUNNING)
            write_frame(answers, *_answer(model, request, arrays))
        except Exception as error:
            write_frame(answers, _describe(error, path))


def _answer(model: ExportedModel, request: dict[str, Any], arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    match request["do"]:
        case "open":
            return {"metadata": dict(model.metadata), "shape": None if model.shape is None else list(model.shape)}, []
        case "cost":
            channels, height, width = request["shape"]
            macs, params = model.cost((channels, height, width))
            return {"macs": macs, "params": params}, []
        case _:
            images, before = torch.from_numpy(np.array(arrays[0])), read_clocks()
            outputs = [output.numpy() for output in model.outputs(images)]
            return {"took": [now - then for now, then in zip(read_clocks(), before)]}, outputs


def _try(model: ExportedModel) -> None:
    """Run one image of zeros, so that a file that loops is found out before a batch waits for it."""
    if model.shape is not None:
        model.outputs(torch.zeros(1, *model.shape))


def _describe(error: Exception, path: Path) -> dict[str, Any]:
    if isinstance(error, DpmError):
        kinds = (ModelFileError, UsageError, RunError)
        kind = next((each.__name__ for each in kinds if isinstance(error, each)), "RunError")
        return {"error": kind, "said": str(error)}
    return {"error": "ModelFileError", "said": f"{path} cannot be run: {one_line(error)}"}


def _take_streams() -> tuple[RawIOBase, IO[bytes]]:
    """Keep the two pipes for ourselves: a runtime prints to stdout."""
    questions, answers = FileIO(os.dup(0)), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nothing, number)
    return questions, answers


def _limit_memory(most: int) -> None:
    """Refuse this process more bytes of data; where the system cannot do that, the limit of time alone holds."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _limit_time(seconds: float) -> None:
    """End this process by SIGXCPU when it takes so many more seconds of processor time."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _used(field: str) -> int:
    """Return bytes of this process's memory, as Linux counts them; 0 elsewhere."""
    try:
        found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    main()

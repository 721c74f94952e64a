"""Know the runtimes that exported files are run in, and what installs them."""

import importlib.util
from typing import Literal

from dpm_cli.errors import UsageError

Runtime = Literal["torch", "onnxruntime", "openvino", "executorch", "tensorrt"]

RUNS: dict[str, tuple[Runtime, ...]] = {  # format of a file -> runtimes that can run it, the usual one first
    "onnx": ("onnxruntime", "openvino", "tensorrt"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "torchscript": ("torch",),
    "pt2": ("torch",),
    "weights": ("torch",),  # of a module
}
KINDS = {  # format of a file -> what to call it
    "onnx": "an ONNX file",
    "openvino": "an OpenVINO file",
    "executorch": "an ExecuTorch file",
    "torchscript": "a TorchScript file",
    "pt2": "a torch.export file",
    "weights": "a file of weights",
}
RUNTIMES: tuple[Runtime, ...] = ("torch", "onnxruntime", "openvino", "executorch", "tensorrt")
INSTALLS = {
    "openvino": "pip install 'dpm-cli[openvino]'",
    "executorch": "pip install 'dpm-cli[executorch]'",
    "tensorrt": "pip install onnxruntime-gpu in place of onnxruntime, and TensorRT, on a machine with an NVIDIA GPU",
}


def is_installed(runtime: Runtime) -> bool:
    """Tell whether a runtime can be used here."""
    if runtime == "tensorrt":
        import onnxruntime

        return "TensorrtExecutionProvider" in onnxruntime.get_available_providers()
    return importlib.util.find_spec(runtime) is not None


def require_runtime(runtime: str) -> Runtime:
    """Check that a runtime is known and installed. Raises UsageError with the line that installs it."""
    for known in RUNTIMES:
        if known == runtime:
            if not is_installed(known):
                raise UsageError(f"the runtime {runtime} is not installed: {INSTALLS.get(runtime, runtime)}")
            return known
    raise UsageError(f"runtime {runtime!r} is not known; known: {', '.join(RUNTIMES)}")


def require_format(format: str) -> None:
    """Check that what writes a format is installed. Raises UsageError with the line that installs it."""
    if format in INSTALLS:
        require_runtime(format)


def choose_runtime(format: str, wanted: str | None, path: object) -> Runtime:
    """Return the runtime for a file. Raises UsageError if the wanted one cannot run it, or is not installed."""
    able = RUNS[format]
    runtime = require_runtime(wanted or able[0])
    if runtime not in able:
        raise UsageError(
            f"{path} is {KINDS[format]}, which {runtime} cannot run; {', '.join(able)} can. "
            "dpm export slim.pt --format … writes others"
        )
    return runtime

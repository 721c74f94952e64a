"""Write single operators as tiny ONNX files, so that a runtime can be asked what they cost."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpm_cli.export.noise import quiet
from dpm_cli.layers.modes import in_mode
from dpm_cli.measure import keeping_denormals

CPU = torch.device("cpu")
SECONDS, LEAST, MOST = 0.02, 12, 200  # of one operator, and calls


@dataclass(frozen=True)
class Operator:
    """A convolution or a product with a weight matrix, and the shape of what it reads."""

    weight: tuple[int, ...]  # (out, in / groups, height, width), or (out, in)
    reads: tuple[int, ...]  # (B, C, H, W), or (B, …, C)
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def resize(self, outputs: int, inputs: int) -> "Operator":
        """Return it with other lengths of the first two axes of its weight. Depthwise convolutions stay depthwise."""
        if len(self.weight) == 2:
            return replace(self, weight=(outputs, inputs), reads=(*self.reads[:-1], inputs))
        is_depthwise = self.groups > 1 and self.weight[1] == 1
        groups = self.groups * outputs // self.weight[0] if is_depthwise else self.groups
        reads = (self.reads[0], inputs * groups, *self.reads[2:])
        return replace(self, weight=(outputs, inputs, *self.weight[2:]), reads=reads, groups=groups)


def find_operators(model: nn.Module, images: Tensor) -> dict[str, Operator]:
    """Run a module on `images` (B, C, H, W); describe the convolutions and linear layers that ran, by their weights."""
    found: dict[str, Operator] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        name, reads = f"{name}.weight".lstrip("."), tuple(inputs[0].shape)
        if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str):
            found[name] = Operator(
                tuple(layer.weight.shape), reads, layer.stride, layer.padding, layer.dilation, layer.groups
            )
        elif isinstance(layer, nn.Linear):
            found[name] = Operator(tuple(layer.weight.shape), reads)

    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: note(name, layer, inputs))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    try:
        with in_mode(model, training=False), torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def serialise_operator(operator: Operator | None) -> bytes:
    """Write an ONNX file of one operator with random weights, of float32; None: one that only copies a number."""
    import onnx

    helper, numpy = onnx.helper, onnx.numpy_helper
    generator = torch.Generator().manual_seed(0)
    if operator is None:
        reads: tuple[int, ...] = (1, 1, 1, 1)
        nodes, weights = [helper.make_node("Identity", ["x"], ["y"])], []
    else:
        weight, reads = torch.randn(operator.weight, generator=generator), operator.reads
        attributes: dict[str, Any] = {}
        if len(operator.weight) == 4:
            attributes = {
                "strides": operator.stride,
                "pads": (*operator.padding, *operator.padding),
                "dilations": operator.dilation,
                "group": operator.groups,
            }
        kind = "Conv" if attributes else "MatMul"
        stored = weight if attributes else weight.t().contiguous()
        nodes = [helper.make_node(kind, ["x", "w"], ["y"], "operator", **attributes)]
        weights = [numpy.from_array(stored.numpy(), "w")]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "probe",
        [value("x", onnx.TensorProto.FLOAT, list(reads))],
        [value("y", onnx.TensorProto.FLOAT, None)],
        weights,
    )
    opsets = [helper.make_opsetid("", 18)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def time_operator(operator: Operator | None, *, runtime: str, threads: int, device: torch.device = CPU) -> float:
    """Return the nanoseconds of a warm call of one operator, see `clock_for`. device: of the runtime torch"""
    reads = (1, 1, 1, 1) if operator is None else operator.reads
    images = torch.randn(reads, generator=torch.Generator().manual_seed(1))
    if runtime == "torch":
        call = _open_in_torch(operator, images.to(device))
    else:
        call = _open(serialise_operator(operator), images.numpy(), runtime, threads)
    with torch.inference_mode(), using_threads(threads):
        return _time(call, clock_for(threads, device))


def _time(call: Callable[[], object], clock: Callable[[], int]) -> float:
    times: list[int] = []
    end = time.perf_counter() + SECONDS
    while len(times) < LEAST or (time.perf_counter() < end and len(times) < MOST):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.quantiles(times[1:], n=4, method="inclusive")[0]


def clock_for(threads: int, device: torch.device) -> Callable[[], int]:
    """Return the clock for calls that use so many threads, in nanoseconds.

    One thread's processor time leaves out what other programs take; of several threads, only the wall clock tells, and
    of a GPU only once it has finished.
    """
    if device.type == "cuda":

        def finished() -> int:
            torch.cuda.synchronize(device)
            return time.perf_counter_ns()

        return finished
    return time.process_time_ns if threads == 1 else time.perf_counter_ns


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Temporarily let torch compute with so many threads; other runtimes were opened with theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open_in_torch(operator: Operator | None, images: Tensor) -> Callable[[], object]:
    """images: on the device"""
    if operator is None:
        return lambda: images.view_as(images)
    weight = torch.randn(operator.weight, generator=torch.Generator().manual_seed(0)).to(images.device)
    if len(operator.weight) == 2:
        return lambda: functional.linear(images, weight)
    padding, dilation, groups = operator.padding, operator.dilation, operator.groups
    return lambda: functional.conv2d(images, weight, None, operator.stride, padding, dilation, groups)


def _open(content: bytes, array: Any, runtime: str, threads: int) -> Callable[[], object]:
    with keeping_denormals(), quiet():
        if runtime == "openvino":
            import openvino

            core = openvino.Core()
            settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            request = core.compile_model(core.read_model(content), "CPU", settings).create_infer_request()
            return lambda: request.infer({0: array})
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": array})

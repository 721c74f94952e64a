"""Write and read OpenVINO IR: model.xml, the graph, with model.bin, the weights. ONNX is read, too."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpm_cli.errors import ModelFileError, RunError, one_line
from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.noise import quiet
from dpm_cli.files import MARKS
from dpm_cli.measure import keeping_denormals

METADATA = ["dpm", "metadata"]  # its place in the file


def serialise(onnx: bytes, metadata: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Convert an ONNX file; return the graph (.xml) and the weights (.bin) in float32. Raises RunError.

    Our mark follows the weights, where nothing in the graph points.
    """
    import openvino

    with tempfile.TemporaryDirectory(prefix="dpm-") as folder, quiet():
        source, target = Path(folder) / "model.onnx", Path(folder) / "model.xml"
        source.write_bytes(onnx)
        try:
            model = openvino.convert_model(source)
            model.set_rt_info(json.dumps(dict(metadata)), METADATA)
            openvino.save_model(model, target, compress_to_fp16=False)
        except Exception as error:  # the ONNX file has run before, so this is the converter's problem
            raise RunError(f"OpenVINO cannot convert the model: {one_line(error, root_cause=True)}") from error
        return target.read_bytes(), target.with_suffix(".bin").read_bytes() + MARKS["model.bin"]


def read(path: Path, *, threads: int | None = None) -> ExportedModel:
    """Open an IR (the .xml, with the .bin beside it) or an ONNX file in OpenVINO on the CPU.

    threads: as many as torch has by default. Raises ModelFileError if it cannot be read, or does not take one batch of
    images.
    """
    import openvino

    core = openvino.Core()
    try:
        with quiet(), keeping_denormals():
            model = core.read_model(path)
            threads = threads or torch.get_num_threads()
            compiled = core.compile_model(
                model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            )
            info = model.get_rt_info(METADATA).astype(str) if model.has_rt_info(METADATA) else "{}"
        metadata = {str(key): str(value) for key, value in json.loads(info).items()}
    except Exception as error:  # its exceptions share no base class
        raise ModelFileError(f"{path} is no model that OpenVINO can run ({one_line(error, root_cause=True)})") from None
    shapes = [each.partial_shape for each in compiled.inputs]
    if len(shapes) != 1 or shapes[0].rank.is_dynamic or len(shapes[0]) != 4:
        raise ModelFileError(f"{path} takes {len(shapes)} inputs; needed is one batch of images")
    sides = list(shapes[0])[1:]
    fixed = None if any(side.is_dynamic for side in sides) else [side.get_length() for side in sides]
    request = compiled.create_infer_request()

    def outputs(images: Tensor) -> list[Tensor]:
        try:
            found = request.infer({0: images.detach().cpu().contiguous().numpy()})
            return [torch.from_numpy(np.array(found[port])) for port in compiled.outputs]
        except Exception as error:  # its exceptions share no base class
            raise RunError(
                f"{path} fails on images of shape {tuple(images.shape)}: {one_line(error, root_cause=True)}"
            ) from error

    weights = sum(
        node.get_data().size
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and node.get_output_size() and node.get_data().dtype.kind == "f"
    )
    shape = None if fixed is None else (fixed[0], fixed[1], fixed[2])
    return ExportedModel("openvino", path, metadata, shape, outputs, lambda _: (None, weights))

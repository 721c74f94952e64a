"""The archive of torch.export (.pt2): for Python without this package, torch.compile and AOTInductor."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_cli.errors import RunError
from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.noise import explain, quiet
from dpm_cli.export.verify import tensors
from dpm_cli.measure import without_mha_fastpath

EXTRA = "dpm.json"  # in the archive: the metadata and the shape of one image, as in TorchScript


def serialise(module: nn.Module, example: Tensor, metadata: Mapping[str, str]) -> bytes:
    """Export a module (eval mode, on the CPU) with an example (B >= 2, C, H, W). Raises RunError if it cannot be."""
    extra = json.dumps({"metadata": dict(metadata), "shape": list(example.shape[1:])})
    buffer = io.BytesIO()
    with quiet(), torch.no_grad(), without_mha_fastpath():
        try:
            dynamic = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
            torch.export.save(program, buffer, extra_files={EXTRA: extra})
        except Exception as error:  # whatever the exporter stumbles over, the model itself has run before
            raise RunError(f"the model cannot be exported: {explain(error)}") from error
    return buffer.getvalue()


def read_own(path: Path) -> ExportedModel:
    """Open an archive that this process has just written: the loader may unpickle and evaluate what is in a file."""
    extra = {EXTRA: ""}
    with quiet():
        loaded = torch.export.load(path, extra_files=extra).module()
    content = json.loads(extra[EXTRA])

    def outputs(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return tensors(loaded(images.cpu()))

    return ExportedModel("pt2", path, content["metadata"], tuple(content["shape"]), outputs)

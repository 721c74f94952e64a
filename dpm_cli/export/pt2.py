"""Write and read archives of torch.export (.pt2), for Python without this package, torch.compile and AOTInductor."""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_cli.errors import ModelFileError, RunError, one_line
from dpm_cli.export.exported import EXTRA, ExportedModel, parse_extra
from dpm_cli.export.noise import quiet
from dpm_cli.layers.images import Shape
from dpm_cli.layers.modes import plain_attention
from dpm_cli.layers.outputs import output_tensors
from dpm_cli.measure import count_macs_of_call, count_parameters


def serialise(module: nn.Module, example: Tensor, metadata: Mapping[str, str]) -> bytes:
    """Export a module (eval mode, on the CPU) with an example (B >= 2, C, H, W). Raises RunError if it cannot be."""
    extra = json.dumps({"metadata": dict(metadata), "shape": list(example.shape[1:])})
    buffer = io.BytesIO()
    with quiet(), torch.no_grad(), plain_attention():
        try:
            dynamic = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
            torch.export.save(program, buffer, extra_files={EXTRA: extra})
        except Exception as error:  # the model itself has run before, so this is the exporter's problem
            raise RunError(f"the model cannot be exported: {one_line(error, root_cause=True)}") from error
    return buffer.getvalue()


def is_torch_export(path: Path) -> bool:
    """Tell whether a zip file looks like an archive of torch.export."""
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2] == "archive_format" for name in archive.namelist())


def read(path: Path) -> ExportedModel:
    """Open an archive that this process wrote, or that the user trusts: the loader may unpickle what is in it.

    Raises ModelFileError if it is damaged.
    """
    extra = {EXTRA: ""}
    try:
        with quiet():
            loaded = torch.export.load(path, extra_files=extra).module()
        metadata, shape = parse_extra(extra[EXTRA])
    except Exception as error:  # a damaged file can upset the reader in any way
        raise ModelFileError(f"{path} is a damaged torch.export archive ({one_line(error, root_cause=True)})") from None

    def outputs(images: Tensor) -> list[Tensor]:
        try:
            with torch.no_grad():
                return output_tensors(loaded(images.cpu()))
        except Exception as error:  # its guards raise AssertionError, its operators RuntimeError
            raise RunError(
                f"{path} fails on images of shape {tuple(images.shape)}: {one_line(error, root_cause=True)}"
            ) from error

    def cost(shape: Shape) -> tuple[int | None, int]:
        return count_macs_of_call(loaded, torch.zeros(1, *shape)), count_parameters(loaded)

    return ExportedModel("pt2", path, metadata, shape, outputs, cost)

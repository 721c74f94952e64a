"""`dpm export`: export a slim.pt for deployment, without the run that made it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dpm_cli.errors import OutputError, UsageError
from dpm_cli.export import export_model
from dpm_cli.files import METADATA, require_writable, write_text_atomic
from dpm_cli.models import load_slim
from dpm_cli.report import ExportedFile
from dpm_cli.run.delivery import EXPORT_NAMES


def export_slim(
    slim: str | Path,
    *,
    formats: Sequence[str] = ("torchscript", "onnx"),
    output: str | Path = ".",
    overwrite: bool = False,
    arch: str | None = None,
    model: nn.Module | None = None,
    opset: int = 18,
) -> list[ExportedFile]:
    """Export a slim.pt, without the run that made it.

        dpm_cli.export_slim("slim.pt", formats=["onnx"], output="deploy")

    formats: torchscript, onnx, onnx-fp16, pt2. arch: needed for architectures from your own code. model: a freshly
    built dense module, for a file that was saved without an architecture. opset: of ONNX. Every file is reloaded and
    compared before it gets its name.
    """
    for format in formats:
        if format not in EXPORT_NAMES:
            raise UsageError(f"export format {format!r} is not known; known: {', '.join(EXPORT_NAMES)}")
    loaded, folder = load_slim(Path(slim), arch, model=model), Path(output)
    require_writable(folder)
    paths = {known: folder / name for known, name in EXPORT_NAMES.items() if known in formats}
    for path in paths.values():
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists: choose another --output, or --overwrite to replace it")
    beside, described = folder / METADATA, loaded.metadata.to_json()
    if beside.exists() and not overwrite and beside.read_text(encoding="utf-8", errors="replace") != described:
        raise OutputError(f"{beside} exists and describes another model: choose another --output, or --overwrite")
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *loaded.shape, generator=generator)
    exported = []
    for format, path in paths.items():
        made = export_model(
            loaded.module, image, format=format, path=path, metadata=loaded.metadata.to_strings(), opset=opset
        )
        exported.append(ExportedFile(format, str(path), made.bytes, made.max_difference))
    write_text_atomic(beside, described)
    return exported

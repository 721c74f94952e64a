"""Files that deploy: TorchScript, ONNX and torch.export, each loaded again and compared before it gets its name."""

from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.read import is_program, open_exported
from dpm_cli.export.write import Exported, Format, export_model

__all__ = ["Exported", "ExportedModel", "Format", "export_model", "is_program", "open_exported"]

"""Files that deploy: TorchScript, ONNX and torch.export, each loaded again and compared before it gets its name."""

from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.read import open_exported
from dpm_cli.export.write import Exported, Format, export_model

__all__ = ["Exported", "ExportedModel", "Format", "export_model", "open_exported"]

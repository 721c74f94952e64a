"""Files that deploy: TorchScript, ONNX and torch.export, each loaded again and compared before it gets its name."""

from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.int8 import Calibration
from dpm_cli.export.read import is_program, open_exported
from dpm_cli.export.runtimes import RUNS, RUNTIMES, choose_runtime, require_format, require_runtime
from dpm_cli.export.write import Exact, Exported, Format, export_int8, export_model

__all__ = [
    "RUNS",
    "RUNTIMES",
    "Calibration",
    "Exact",
    "Exported",
    "ExportedModel",
    "Format",
    "choose_runtime",
    "export_int8",
    "export_model",
    "is_program",
    "open_exported",
    "require_format",
    "require_runtime",
]

"""Build architectures by name, load model files of any origin, and keep slim files."""

from dpm_cli.models.load import Loaded, load_model
from dpm_cli.models.metadata import Metadata
from dpm_cli.models.slim import Slim, load, load_slim, save_slim
from dpm_cli.models.structure import Edits, apply_edits_, find_edits
from dpm_cli.models.zoo import BUILT_IN, build

__all__ = [
    "BUILT_IN",
    "Edits",
    "Loaded",
    "Metadata",
    "Slim",
    "apply_edits_",
    "build",
    "find_edits",
    "load",
    "load_model",
    "load_slim",
    "save_slim",
]

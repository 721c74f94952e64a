"""Load datasets as tensors on the device, or stream them. (seed, epoch, index) alone decide every batch."""

from dpm_cli.data.load import load_data
from dpm_cli.data.splits import Images, Split, Splits
from dpm_cli.data.streamed import Streamed
from dpm_cli.data.waiting import Waiting

__all__ = ["Images", "Split", "Splits", "Streamed", "Waiting", "load_data"]

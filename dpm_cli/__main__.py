"""The command `dpm`, also as `python -m dpm_cli`."""

import os
import signal
import sys
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)  # while modules are imported, and after the last line, there is nothing to tidy up


def main() -> int:
    """Run `dpm`. Ctrl-C never shows a traceback, from the first import on."""
    signal.signal(signal.SIGINT, _leave)
    from dpm_cli.cli.app import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())

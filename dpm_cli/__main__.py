"""`python -m dpm_cli` is the command `dpm`."""

import sys

from dpm_cli.cli.app import main

sys.exit(main())

"""`dpm schema`: print the JSON Schema of recipes, for editors and scripts."""

import sys


def schema() -> None:
    """Print the JSON Schema of recipes, with every setting described.

    Editors that know YAML schemas complete and check recipes by it: dpm schema > dpm.schema.json
    """
    from dpm_cli.recipe import dump_schema

    sys.stdout.write(dump_schema())

"""The command line `dpm`: the only part that prints."""

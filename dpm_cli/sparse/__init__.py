"""Cut single weights instead of units, with Pruning On-the-Fly."""

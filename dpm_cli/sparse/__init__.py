"""Single weights instead of units: Pruning On-the-Fly."""

"""The story of one pruning run, and its rooms."""

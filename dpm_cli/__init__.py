"""Prune a trained PyTorch vision model with the Decay Pruning Method and export verified files."""

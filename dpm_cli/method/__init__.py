"""Implement the Decay Pruning Method for any training loop, without the training engine."""

"""The Decay Pruning Method for any training loop: it knows neither recipes nor the training engine."""

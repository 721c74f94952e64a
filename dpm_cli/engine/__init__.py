"""Train, evaluate and checkpoint a model. loop.py holds the training loop."""

"""Training and what belongs to it: one step, its settings, evaluation, checkpoints. The stage loop is in run.py."""

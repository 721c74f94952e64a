"""Carry out one pruning run; start reading at story.py."""

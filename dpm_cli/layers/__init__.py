"""Modules that take the place of others in a model, and what modes they are in."""

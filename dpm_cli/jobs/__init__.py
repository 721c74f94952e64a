"""Implement each command as a function that prints nothing."""

"""Define what a model is trained for, one task per file."""

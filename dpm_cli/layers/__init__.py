"""Modules that replace layers of a model, and small tools for any module: its modes, its outputs."""

"""Notebooks with their outputs, and a runner that needs no Jupyter."""

"""Texts for the examples: Python's documentation, Jane Austen's novels and the King James Bible."""

"""Examples, a module each: `python -m examples.recall`. See README.md in this folder."""

"""Long-context tasks that others know, for models with and without memory: `python -m examples.long_context`."""

"""A memory trained into SmolLM2 on one accelerator, in minutes: `python -m examples.smollm2.memory`."""

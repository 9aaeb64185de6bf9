"""A small language model, pre-trained here, to try memories on in minutes: `python -m examples.laboratory`."""

"""The command of this folder: `python -m examples.smollm2.memory`, see `command.py`."""

from examples.smollm2.memory.command import main

if __name__ == "__main__":
    main()

"""`python -m examples.passkey` runs the demo, `python -m examples.passkey.demo`."""

from examples.passkey.demo import main

if __name__ == "__main__":
    main()

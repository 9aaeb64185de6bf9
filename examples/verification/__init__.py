"""Long checks that are no unit tests: faults, threads, resuming, conversions, TPU programs."""

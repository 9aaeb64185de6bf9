"""Checks that take longer than a unit test: faults, threads, resumption, conversions, TPU programs."""

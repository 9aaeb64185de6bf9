"""Training and streaming over several devices."""

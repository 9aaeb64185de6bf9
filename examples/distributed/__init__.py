"""Training and streaming over several devices, with the numbers of one device."""

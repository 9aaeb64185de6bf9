"""Pure functions over `keras.ops`: rotary positions, visibility, attention, the scan over blocks."""

"""What the benchmarks compare with: handwritten versions, stock attention, other packages."""

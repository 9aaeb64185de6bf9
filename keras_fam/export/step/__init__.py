"""One step of a stream with explicit state, as an ONNX, LiteRT or torch file."""

"""Streams: `StreamingModel`, generation, and sessions on disk."""

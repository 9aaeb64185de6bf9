"""Serving exported models; see examples/guides/serving.md."""

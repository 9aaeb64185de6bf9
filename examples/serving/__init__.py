"""Serving an export."""

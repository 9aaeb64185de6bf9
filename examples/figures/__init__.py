"""Figures of masks and attention."""

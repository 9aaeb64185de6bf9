"""Keras layers: `FeedbackAttention`, `TransformerFAMBlock`, `RandomStatePassing`."""

"""Layouts of weights and stream states over devices (`keras.distribution`)."""

"""Activations that Keras has no name for."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_fam")
def gelu_tanh(x):
    """GELU through its tanh approximation, as Gemma has it (`"gelu"` by name is the exact one in Keras)."""
    return ops.gelu(x, approximate=True)

"""Models of KerasHub with a memory: `convert` them, and `to_keras_hub` back again.

KerasHub itself is imported by the functions that need it: `pip install 'keras-fam[hub]'`.
"""

from keras_fam.hub.convert import convert, to_keras_hub
from keras_fam.hub.weights import memory_weights

__all__ = ["convert", "memory_weights", "to_keras_hub"]

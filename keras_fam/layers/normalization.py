"""The norms of a layer, by name."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_fam")
class OffsetRMSNormalization(keras.layers.RMSNormalization):
    """RMS norm that multiplies by `1 + scale`, as Gemma's do: small scales keep all their digits in any dtype.

    Args:
        axis: the last axis, -1.
        epsilon: added to the mean square.
    """

    def build(self, input_shape):
        self.scale = self.add_weight(name="scale", shape=(input_shape[-1],), initializer="zeros")

    def call(self, x):
        scale = ops.cast(self.scale, keras.backend.result_type(x.dtype, "float32")) + 1
        return ops.rms_normalization(x, scale=scale, axis=-1, epsilon=self.epsilon)


NORMS = {
    "rms_norm": keras.layers.RMSNormalization,
    "offset_rms_norm": OffsetRMSNormalization,
    "layer_norm": keras.layers.LayerNormalization,
}

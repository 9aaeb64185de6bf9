"""What becomes of a memory between two blocks: `Residual` (the paper's), `Normalized`, `Binary`, or one of your own."""

import keras
from keras import ops

from keras_fam.layers.validation import require_positive
from keras_fam.ops.random import noise as draw_noise

RMS_EPSILON = 1e-6


def mean_square(fam):
    """`[B, F, D]` to `[B, F, 1]`."""
    return ops.mean(ops.square(fam), axis=-1, keepdims=True)


@keras.saving.register_keras_serializable(package="keras_fam")
class MemoryUpdate(keras.layers.Layer):
    """Base of memory updates: from the rows that a layer wrote to the memory that its next block reads.

    A subclass implements `update`. Its weights, if any, are made in `build`, and its constructor takes `noise` and
    `**kwargs`, so that a model can give each of its layers an update of its own:

    ```python
    @keras.saving.register_keras_serializable()
    class Decay(keras_fam.MemoryUpdate):
        def update(self, written, previous):
            return 0.9 * previous + 0.1 * written

    block = keras_fam.TransformerFAMBlock(4, 16, 128, block_size=32, fam_length=8, memory_update=Decay())
    ```

    Args:
        noise: standard deviation of Gaussian noise that is added to every new memory in training, relative to each
            row's root mean square (an addition of this project: a memory that survives noise keeps what it holds for
            longer). `keras_fam.training.NoiseRamp` and `NoiseScale` let it grow during training.

    Raises:
        ValueError: if `noise` is negative.
    """

    def __init__(self, noise: float = 0.0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        require_positive("noise", noise, zero=True)
        self.noise = noise

    def build(self, input_shape):
        self.noise_scale = None
        if self.noise and input_shape[1]:
            self.noise_scale = self.add_weight(
                shape=(), dtype="float32", initializer="ones", trainable=False, name="noise_scale"
            )

    def update(self, written, previous):
        """The new memory `[B, F, D]`, before noise.

        Args:
            written: `[B, F, D]`, float32 or wider: the layer's output for its memory rows.
            previous: `[B, F, D]`, the memory that the block has read.
        """
        raise NotImplementedError

    def perturb(self, fam, drawn):
        """`fam` with noise `drawn` `[B, F, D]`, whose standard deviation is `noise` times the scale in force."""
        return fam + drawn * ops.sqrt(mean_square(fam))

    def call(self, written, previous, seed=None):
        """`update`, then noise where `seed`, an integer tensor `[2]`, is given."""
        fam = self.update(written, previous)
        if not self.noise or seed is None:
            return fam
        drawn = draw_noise(ops.shape(fam), fam.dtype, seed)
        return self.perturb(fam, self.noise * ops.cast(self.noise_scale, fam.dtype) * drawn)

    def compute_output_shape(self, written_shape, previous_shape=None):
        return written_shape

    def get_config(self):
        config = super().get_config()
        config.pop("autocast", None)
        config.pop("dtype", None)  # that of the memory, which is float32 or wider
        return {**config, "noise": self.noise}


@keras.saving.register_keras_serializable(package="keras_fam")
class Residual(MemoryUpdate):
    """The paper's update (Alg. 2): the memory is what the layer wrote. Its root mean square grows with every block."""

    def update(self, written, previous):
        return written


@keras.saving.register_keras_serializable(package="keras_fam")
class Normalized(MemoryUpdate):
    """Each row is divided by its root mean square, so that every update weighs the same (an addition of this project).

    ```python
    keras_fam.TransformerFAMBackbone(1000, 2, 64, 4, 128, block_size=32, fam_length=8, memory_update="normalized")
    keras_fam.TransformerFAMBackbone(1000, 2, 64, 4, 128, memory_update=keras_fam.Normalized(noise=0.7))
    ```
    """

    def update(self, written, previous):
        return written * ops.rsqrt(mean_square(written) + RMS_EPSILON)


@keras.saving.register_keras_serializable(package="keras_fam")
class Binary(MemoryUpdate):
    """The sign of every number alone, 1 or −1, with a straight-through gradient (an experiment of this project).

    An update of less than 1 leaves no trace, so small errors do not accumulate. Where a number is within rounding of
    0, its sign, and all that follows, may depend on how a text is split into chunks.

    Args:
        noise: as in `MemoryUpdate`, but a sign flips where the noise exceeds the value: 4.8 % of the signs at 0.6,
            16 % at 1.
    """

    def update(self, written, previous):
        # Gradients pass where |written| ≤ 2: as far as an update has to go to flip a sign, and a little further.
        clipped = ops.clip(written, -2.0, 2.0)
        signs = ops.cast(ops.where(written >= 0, 1.0, -1.0), written.dtype)
        return clipped + ops.stop_gradient(signs - clipped)

    def perturb(self, fam, drawn):
        return fam * ops.where(1.0 + drawn > 0, ops.ones_like(fam), -ops.ones_like(fam))


MEMORY_UPDATES = {"residual": Residual, "normalized": Normalized, "binary": Binary}


def get(identifier):
    """A memory update of its own for one layer, from a name, a config or an object.

    Args:
        identifier: `"residual"`, `"normalized"`, `"binary"`, a serialized update, or a `MemoryUpdate`, which is copied
            without its weights.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, MemoryUpdate):
        return type(identifier).from_config({**identifier.get_config(), "name": "memory_update"})
    if isinstance(identifier, str) and identifier in MEMORY_UPDATES:
        return MEMORY_UPDATES[identifier](name="memory_update")
    raise ValueError(
        f"`memory_update` must be one of {', '.join(map(repr, MEMORY_UPDATES))}, or a keras_fam.MemoryUpdate such as "
        f"keras_fam.Normalized(noise=0.7); received {identifier!r}."
    )


def serialize(update):
    """The short name of an update without settings, else its config."""
    for name, kind in MEMORY_UPDATES.items():
        if type(update) is kind and not update.noise:
            return name
    return keras.saving.serialize_keras_object(update)

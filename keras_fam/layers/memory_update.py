"""What becomes of a memory between two blocks: `Residual` (the paper's), `Normalized`, `Average`, `HardGate`, or one of
your own."""

import math

import keras
import numpy as np
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

    Attributes:
        takes_first_write: whether what the first block writes becomes the memory as it is: for updates that keep a part
            of what was there, where there is nothing worth keeping. False.

    Raises:
        ValueError: if `noise` is negative.
    """

    takes_first_write = False

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

    def call(self, written, previous, seed=None, fresh=None):
        """`update`, then noise where `seed`, an integer tensor `[2]`, is given.

        Args:
            written, previous: see `update`.
            seed: None, or an integer tensor `[2]`.
            fresh: None, or bool `[1 or B]`: rows whose `previous` is F_0; read where `takes_first_write`.
        """
        fam = self.update(written, previous)
        if self.takes_first_write and fresh is not None:
            fam = ops.where(fresh[:, None, None], written, fam)
        if not self.noise or seed is None:
            return fam
        drawn = draw_noise(ops.shape(fam), fam.dtype, seed)
        scale = self.noise * ops.cast(self.noise_scale, fam.dtype)
        return fam + scale * drawn * ops.sqrt(mean_square(fam))

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
class Average(MemoryUpdate):
    """A running average, F ← F + weight·(U − F), of what the layer writes, U (an addition of this project).

    Older blocks fade: of what one block wrote, (1 − weight)^n is left after n more. The first write is taken as it is.

    ```python
    keras_fam.TransformerFAMBackbone(1000, 2, 64, 4, 128, block_size=32, fam_length=8, memory_update="average")
    keras_fam.TransformerFAMBackbone(1000, 2, 64, 4, 128, memory_update=keras_fam.Average(0.1, learned=True))
    ```

    Args:
        weight: share of the new, above 0 and at most 1.
        learned: whether each row of each layer learns its own weight, from `weight` on: F logits per layer, of which
            the weights are the sigmoid. `weight` is then less than 1.
        noise: as in `MemoryUpdate`.

    Raises:
        ValueError: for a weight outside of these bounds.
    """

    takes_first_write = True

    def __init__(self, weight: float = 0.5, learned: bool = False, noise: float = 0.0, **kwargs):
        super().__init__(noise=noise, **kwargs)
        require_positive("weight", weight)
        if weight > 1 or (learned and weight == 1):
            raise ValueError(
                f"`weight` is the share of the new in an average, above 0 and {'below' if learned else 'at most'} 1"
                f"{' where it is learned, as a sigmoid' if learned else ''}; received {weight!r}. For the new alone, "
                'use memory_update="residual".'
            )
        self.weight, self.learned = weight, learned

    def build(self, input_shape):
        super().build(input_shape)
        self.logit = None
        if self.learned and input_shape[1]:
            start = keras.initializers.Constant(math.log(self.weight / (1 - self.weight)))
            self.logit = self.add_weight(shape=(input_shape[1],), initializer=start, autocast=False, name="logit")

    def update(self, written, previous):
        weight = self.weight
        if self.learned:
            weight = ops.expand_dims(ops.cast(ops.sigmoid(ops.convert_to_tensor(self.logit)), written.dtype), 1)
        return previous + weight * (written - previous)

    def get_config(self):
        return {**super().get_config(), "weight": self.weight, "learned": self.learned}


@keras.saving.register_keras_serializable(package="keras_fam")
class HardGate(MemoryUpdate):
    """Each row is kept as it is or rewritten as a whole, at every block (an addition of this project).

    A row decides from what it holds, F, and what it would write, U: it is rewritten where
    `z = 4/√D · w·[n(F), n(U), n(F)·n(U)] + b_r` is above 0, with n the RMS norm of a row. A row that is not rewritten
    keeps its numbers to the bit, at any length. Gradients are those of a soft gate, σ(z) (straight through). The first
    write is taken as it is.

    The weights of a layer are w, 3·D numbers that start at 0, and b, one number per row, spread from −2 to 2: at first
    half of the rows keep what the first block wrote, the others are rewritten at every block.

    Where z is within rounding of 0, whether a row is rewritten may depend on how a text is split into chunks.

    ```python
    keras_fam.TransformerFAMBackbone(1000, 2, 64, 4, 128, block_size=32, fam_length=8, memory_update="hard_gate")
    ```

    Args:
        noise: as in `MemoryUpdate`; in training it also acts on rows that are kept.
    """

    takes_first_write = True

    def build(self, input_shape):
        super().build(input_shape)
        self.kernel = self.bias = None
        _, rows, width = input_shape
        if not rows:
            return
        self.kernel = self.add_weight(shape=(3 * width,), initializer="zeros", autocast=False, name="kernel")
        self.bias = self.add_weight(shape=(rows,), initializer=_spread, autocast=False, name="bias")

    def gate(self, written, previous):
        """`[B, F, 1]`: 1 where a row is rewritten, 0 where it is kept, with the gradient of σ(z)."""
        held, new = (x * ops.rsqrt(mean_square(x) + RMS_EPSILON) for x in (previous, written))
        kernel, bias = (ops.cast(ops.convert_to_tensor(v), written.dtype) for v in (self.kernel, self.bias))
        z = ops.sum(ops.concatenate([held, new, held * new], axis=-1) * kernel, axis=-1, keepdims=True)
        z = 4 / math.sqrt(written.shape[-1]) * z + ops.expand_dims(bias, 1)
        soft = ops.sigmoid(z)
        return ops.cast(z > 0, z.dtype) + (soft - ops.stop_gradient(soft))  # what is added is 0, exactly

    def update(self, written, previous):
        gate = self.gate(written, previous)
        return gate * written + (1 - gate) * previous


def _spread(shape, dtype=None):
    """`[F]` from −2 to 2."""
    return ops.convert_to_tensor(np.linspace(-2.0, 2.0, *shape), dtype)


MEMORY_UPDATES = {
    "residual": Residual,
    "normalized": Normalized,
    "average": Average,
    "hard_gate": HardGate,
}


def get(identifier, dtype=None):
    """A memory update of its own for one layer, from a name, a config or an object.

    Args:
        identifier: `"residual"`, `"normalized"`, `"average"`, `"hard_gate"`, a serialized update, or a
            `MemoryUpdate`, which is copied without its weights.
        dtype: None, or the dtype of its weights: that of the memory.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, MemoryUpdate):
        return type(identifier).from_config({**identifier.get_config(), "name": "memory_update", "dtype": dtype})
    if isinstance(identifier, str) and identifier in MEMORY_UPDATES:
        return MEMORY_UPDATES[identifier](name="memory_update", dtype=dtype)
    raise ValueError(
        f"`memory_update` must be one of {', '.join(map(repr, MEMORY_UPDATES))}, or a keras_fam.MemoryUpdate such as "
        f"keras_fam.Normalized(noise=0.7); received {identifier!r}."
    )


def serialize(update):
    """The short name of an update without settings, else its config."""
    for name, kind in MEMORY_UPDATES.items():
        if type(update) is kind and update.get_config() == kind(name=update.name).get_config():
            return name
    return keras.saving.serialize_keras_object(update)

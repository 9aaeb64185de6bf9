"""Tensors of any dtype as float32 words, bit by bit: a session's whole state is one row of one variable.

The words are only ever copied, never computed with, so no bit changes.
"""

import math

from keras_fam.export.saved_model.serving_functions import tensorflow


class PackedTensor:
    """How one leaf `[R, …]` of a state is stored in a row.

    Args:
        shape: static shape without the batch axis.
        dtype: its dtype.

    Attributes:
        count: words per row.
    """

    def __init__(self, shape, dtype):
        tf = tensorflow()
        self.shape, self.dtype = tuple(shape), tf.as_dtype(dtype)
        self.entries = math.prod(self.shape)
        # A boolean takes a word (0.0 or 1.0); two 16-bit numbers share one.
        self.bytes = 4 if self.dtype == tf.bool else self.dtype.size
        self.count = -(-self.entries * self.bytes // 4)

    def encode(self, x):
        """`[R, *shape]` to float32 `[R, count]`."""
        tf = tensorflow()
        x = tf.reshape(x, [tf.shape(x)[0], self.entries])
        if self.dtype == tf.bool:
            return tf.cast(x, tf.float32)
        if self.bytes == 2:
            x = tf.pad(x, [[0, 0], [0, 2 * self.count - self.entries]])
            x = tf.reshape(x, [tf.shape(x)[0], self.count, 2])
        x = x if self.dtype == tf.float32 else tf.bitcast(x, tf.float32)
        return tf.reshape(x, [tf.shape(x)[0], self.count])

    def decode(self, words):
        """The inverse of `encode`."""
        tf = tensorflow()
        rows = tf.shape(words)[0]
        if self.dtype == tf.bool:
            x = tf.cast(words, tf.bool)
        elif self.bytes == 8:
            x = tf.bitcast(tf.reshape(words, [rows, self.entries, 2]), self.dtype)
        else:
            x = words if self.dtype == tf.float32 else tf.bitcast(words, self.dtype)
            x = tf.reshape(x, [rows, self.count * (4 // self.bytes)])[:, : self.entries]
        return tf.reshape(x, [rows, *self.shape])

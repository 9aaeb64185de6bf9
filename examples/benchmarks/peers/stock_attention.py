"""A causal Transformer of stock Keras layers with RoPE, the peer of `examples.benchmarks.against_attention`.

Attention is the fastest of each backend on a CPU. torch: the fused causal `scaled_dot_product_attention` (through
`keras.ops.dot_product_attention`), which skips the masked half. JAX and TensorFlow have no fused kernel on a CPU, and
`[T, T]` logits do not fit at 16k tokens: queries are processed in chunks, each over the keys up to its end, so that the
masked half is skipped as well; in training each chunk is rematerialized.
"""

import keras
import numpy as np
from keras import ops


class CausalAttention(keras.layers.Layer):
    """`[B, T, D]` to `[B, T, D]`; N heads of width H, RoPE.

    Args:
        num_heads: N.
        head_dim: H.
        chunk: int, queries in a chunk where there is no fused kernel.
    """

    def __init__(self, num_heads, head_dim, chunk=512, **kwargs):
        super().__init__(**kwargs)
        self.num_heads, self.head_dim, self.chunk = num_heads, head_dim, chunk

    def build(self, input_shape):
        width = input_shape[-1]
        self.query, self.key, self.value = (
            keras.layers.Dense(self.num_heads * self.head_dim, use_bias=False, name=name)
            for name in ("query", "key", "value")
        )
        self.output_projection = keras.layers.Dense(width, use_bias=False, name="output")
        for layer in (self.query, self.key, self.value):
            layer.build((None, width))
        self.output_projection.build((None, self.num_heads * self.head_dim))
        angles = np.arange(input_shape[1])[:, None] * 10_000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        self.table = np.cos(angles)[:, None].astype("float32"), np.sin(angles)[:, None].astype("float32")

    def rotate(self, x):
        cos, sin = map(ops.convert_to_tensor, self.table)
        first, second = ops.split(x, 2, axis=-1)
        return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def call(self, x):
        shape = ops.shape(x)
        rows = ops.reshape(x, (-1, shape[-1]))
        heads = (*shape[:2], self.num_heads, self.head_dim)
        query, key, value = (ops.reshape(p(rows), heads) for p in (self.query, self.key, self.value))
        query, key = self.rotate(query), self.rotate(key)
        if keras.backend.backend() == "torch":
            out = ops.dot_product_attention(query, key, value, is_causal=True)
        else:
            out = self.in_chunks(query * self.head_dim**-0.5, key, value)
        return ops.reshape(self.output_projection(ops.reshape(out, (-1, heads[2] * heads[3]))), shape)

    def in_chunks(self, query, key, value):
        query, key, value = (ops.transpose(x, (0, 2, 1, 3)) for x in (query, key, value))
        attend, outputs = keras.remat(attend_chunk), []
        for first in range(0, query.shape[2], self.chunk):
            end = min(first + self.chunk, query.shape[2])
            outputs.append(attend(query[:, :, first:end], key[:, :, :end], value[:, :, :end]))
        return ops.transpose(ops.concatenate(outputs, axis=2), (0, 2, 1, 3))


def attend_chunk(query, key, value):
    """The last queries `[B, N, Q, H]` over all keys so far `[B, N, W, H]`."""
    count, width = query.shape[2], key.shape[2]
    logits = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2)))
    hidden = np.triu(np.full((count, count), -1e30, "float32"), 1)
    logits = ops.concatenate([logits[..., : width - count], logits[..., width - count :] + hidden], axis=-1)
    weights = ops.exp(logits - ops.stop_gradient(ops.max(logits, axis=-1, keepdims=True)))
    return ops.matmul(weights, value) / ops.sum(weights, axis=-1, keepdims=True)


class GatedFeedForward(keras.layers.Layer):
    """`[B, T, D]` to `[B, T, D]`; as one matrix, because Keras' `Dense` over `[B, T, D]` trains slowly on JAX."""

    def __init__(self, intermediate, **kwargs):
        super().__init__(**kwargs)
        self.intermediate = intermediate

    def build(self, input_shape):
        width = input_shape[-1]
        self.gate = keras.layers.Dense(self.intermediate, use_bias=False, activation="silu", name="gate")
        self.up = keras.layers.Dense(self.intermediate, use_bias=False, name="up")
        self.down = keras.layers.Dense(width, use_bias=False, name="down")
        self.gate.build((None, width))
        self.up.build((None, width))
        self.down.build((None, self.intermediate))

    def call(self, x):
        rows = ops.reshape(x, (-1, x.shape[-1]))
        return ops.reshape(self.down(self.gate(rows) * self.up(rows)), ops.shape(x))


def full_attention_model(*, vocabulary, layers, width, heads, intermediate, tokens):
    """A functional model, token ids `[B, tokens]` to `[B, tokens, D]`, pre-norm with gated SiLU feed-forward."""

    def norm(x):
        return keras.layers.RMSNormalization(epsilon=1e-6)(x)

    inputs = keras.Input((tokens,), dtype="int32")
    x = keras.layers.Embedding(vocabulary, width)(inputs)
    for _ in range(layers):
        x = x + CausalAttention(heads, width // heads)(norm(x))
        x = x + GatedFeedForward(intermediate)(norm(x))
    return keras.Model(inputs, norm(x))

"""The peer of `examples.benchmarks.gpu`: a causal Transformer of the same width and depth with full attention.

Plain Keras: `ops.dot_product_attention`, which runs the fused kernel of the backend if it has one (cuDNN on JAX,
`scaled_dot_product_attention` on torch). The feed-forward part runs over pieces of the tokens, so that long inputs do
not exhaust memory there.
"""

import keras
from keras import ops

PIECE = 8192  # tokens in a piece of the feed-forward part


def rotate(x, positions):
    """RoPE for `[B, T, N, H]` at `positions` `[T]`."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-ops.arange(half, dtype="float32") / half)
    angles = ops.cast(positions, "float32")[:, None] * rates
    cos, sin = (ops.cast(f(angles), x.dtype)[:, None] for f in (ops.cos, ops.sin))
    first, second = x[..., :half], x[..., half:]
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def write(cache, new, position):
    """A cache with `new` `[B, 1, N, H]` at `position`: in place on torch; on JAX the program may reuse the buffer."""
    if keras.backend.backend() == "torch":
        return cache.index_copy_(1, ops.reshape(position, (1,)).long(), new)
    return ops.slice_update(cache, (0, position, 0, 0), new)


class FullAttentionBlock(keras.layers.Layer):
    """Pre-norm attention and feed-forward, residuals; N heads of width D // N."""

    def __init__(self, num_heads, intermediate_dim, **kwargs):
        super().__init__(**kwargs)
        self.num_heads, self.intermediate_dim = num_heads, intermediate_dim

    def build(self, shape):
        width = shape[-1]
        head = (self.num_heads, width // self.num_heads)
        options = {"dtype": self.dtype_policy}
        self.attention_norm = keras.layers.RMSNormalization(**options)
        self.feedforward_norm = keras.layers.RMSNormalization(**options)
        self.projections = [keras.layers.EinsumDense("btd,dnh->btnh", (None, *head), **options) for _ in range(3)]
        self.output_projection = keras.layers.EinsumDense("btnh,nhd->btd", (None, width), **options)
        self.up = keras.layers.Dense(self.intermediate_dim, activation="gelu", use_bias=False, **options)
        self.down = keras.layers.Dense(width, use_bias=False, **options)
        for layer in (self.attention_norm, self.feedforward_norm, *self.projections, self.up):
            layer.build(shape)
        self.output_projection.build((*shape[:-1], *head))
        self.down.build((*shape[:-1], self.intermediate_dim))

    def project(self, x, positions):
        query, key, value = (project(self.attention_norm(x)) for project in self.projections)
        return rotate(query, positions), rotate(key, positions), value

    def finish(self, x, attended):
        x = x + self.output_projection(attended)
        pieces = [x[:, i : i + PIECE] for i in range(0, x.shape[1], PIECE)]
        return ops.concatenate([p + self.down(self.up(self.feedforward_norm(p))) for p in pieces], axis=1)

    def call(self, x):
        query, key, value = self.project(x, ops.arange(x.shape[1]))
        return self.finish(x, ops.dot_product_attention(query, key, value, is_causal=True))

    def step(self, x, cache, position):
        """One token `[B, 1, D]` at `position` over a cache `(key, value)`, each `[B, W, N, H]`."""
        query, key, value = self.project(x, ops.reshape(position, (1,)))
        cache = tuple(write(held, new, position) for held, new in zip(cache, (key, value), strict=True))
        mask = ops.reshape(ops.arange(cache[0].shape[1]) <= position, (1, 1, 1, -1))
        return self.finish(x, ops.dot_product_attention(query, *cache, mask=mask)), cache


class FullAttention(keras.Model):
    """Token ids `[B, T]` to hidden states `[B, T, D]`.

    Args:
        vocabulary_size, num_layers, hidden_dim, num_query_heads, intermediate_dim: as in `TransformerFAMBackbone`.
        remat: bool, whether each layer is rematerialized.
    """

    def __init__(
        self, vocabulary_size, num_layers, hidden_dim, num_query_heads, intermediate_dim, remat=False, dtype=None
    ):
        super().__init__(dtype=dtype)
        self.remat = remat
        self.hidden_dim, self.num_heads = hidden_dim, num_query_heads
        self.token_embedding = keras.layers.ReversibleEmbedding(vocabulary_size, hidden_dim, dtype=self.dtype_policy)
        self.blocks = [
            FullAttentionBlock(num_query_heads, intermediate_dim, dtype=self.dtype_policy) for _ in range(num_layers)
        ]
        self.final_norm = keras.layers.RMSNormalization(dtype=self.dtype_policy)

    def build(self, input_shape=None):
        self.token_embedding.build((None, None))
        for layer in (*self.blocks, self.final_norm):
            layer.build((None, None, self.hidden_dim))
        self.built = True

    def call(self, token_ids, training=None):
        x = self.token_embedding(token_ids)
        for block in self.blocks:
            x = keras.remat(block)(x) if self.remat and training else block(x)
        return self.final_norm(x)

    def get_cache(self, batch_size, size):
        """Empty caches for `size` tokens: a tuple of `(key, value)` per layer."""
        shape = (batch_size, size, self.num_heads, self.hidden_dim // self.num_heads)
        return tuple((ops.zeros(shape, self.compute_dtype), ops.zeros(shape, self.compute_dtype)) for _ in self.blocks)

    def step(self, token_ids, caches, position):
        """Hidden state `[B, 1, D]` of one token at the int scalar `position`, and the updated caches."""
        x, new = self.token_embedding(token_ids), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.step(x, cache, position)
            new.append(cache)
        return self.final_norm(x), tuple(new)

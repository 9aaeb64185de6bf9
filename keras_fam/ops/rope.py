"""Rotary positions (RoPE), relative by construction.

Only differences of positions matter, so no absolute position is ever formed: keys are rotated by their place in
their own block, queries by theirs, and what lies between two blocks is one constant rotation. All tables are made
in float64 on the host from small integers and rounded once, so token 10,000,000 has the numerics of token 10.
"""

import math

import numpy as np
from keras import ops


def inverse_wavelengths(head_dim, wavelength=10_000.0, scaling=None):
    """Angular frequencies of RoPE, float64 `[H/2]`.

    Args:
        head_dim: H, even.
        wavelength: base of the geometric progression (10,000 in the paper, App. B.2).
        scaling: None, or a dict with `"type"`: `"linear"` (`factor`) or `"llama3"` (`factor`, `low_freq_factor`,
            `high_freq_factor`, `original_max_position_embeddings`).
    """
    inverse = float(wavelength) ** (-np.arange(0, head_dim, 2, dtype="float64") / head_dim)
    if scaling is None:
        return inverse
    kind = scaling.get("type")
    if kind == "linear":
        return inverse / float(scaling["factor"])
    if kind == "llama3":
        period = 2 * math.pi / inverse
        context = float(scaling["original_max_position_embeddings"])
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        smooth = np.clip((context / period - low) / (high - low), 0.0, 1.0)
        return inverse * (smooth + (1.0 - smooth) / float(scaling["factor"]))
    raise ValueError(f"`rope_scaling` has a 'type' of 'linear' or 'llama3'; received {scaling!r}.")


def rotation_table(positions, inverse, dtype="float32"):
    """Host-side `(cos, sin)` of shape `positions.shape + [H/2]` for known positions.

    Args:
        positions: array of numbers.
        inverse: float64 `[H/2]` from `inverse_wavelengths`.
        dtype: dtype of the returned NumPy arrays.
    """
    angles = np.asarray(positions, "float64")[..., None] * inverse
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rotate(x, table):
    """Rotates the two halves of the last axis of `x`.

    Args:
        x: `[..., T, heads, H]`.
        table: `(cos, sin)`, each `[..., T, H/2]`, broadcastable over the leading axes; or None for no rotation.

    Returns:
        The rotated tensor, in the dtype of `x`; the arithmetic is float32 or wider.
    """
    if table is None:
        return x
    cos, sin = (ops.expand_dims(ops.convert_to_tensor(t), -2) for t in table)
    first, second = ops.split(ops.cast(x, cos.dtype), 2, axis=-1)
    rotated = ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return ops.cast(rotated, x.dtype)


def rotate_whole(x, table):
    """`rotate` with tables made for whole heads (`BlockPositions.memory_heads`): few operations, for few rows."""
    cos, sin = table
    wide = ops.cast(x, cos.dtype)
    turned = wide * cos if sin is None else wide * cos + ops.roll(wide, x.shape[-1] // 2, axis=-1) * sin
    return ops.cast(turned, x.dtype)


def memory_positions(fam_length, block_size, fam_position):
    """Places of the memory rows, relative to the start of the block *after* the one they compressed, float64 `[F]`.

    App. B.2: `"last"` are the last F positions of the compressed block; `"float"` spreads the rows evenly over it. The
    paper's third form, `"zero"`, needs absolute positions and is left out.
    """
    rows = np.arange(fam_length, dtype="float64")
    if fam_position == "float":
        return (rows + 1) * block_size / fam_length - 1 - block_size
    return rows - fam_length


class BlockPositions:
    """Every rotation that a layer needs, from its settings.

    Args:
        head_dim: H.
        block_size: S.
        fam_length: F.
        fam_position: `"last"` or `"float"`.
        fam_query_position: `"previous"` or `"current"`.
        wavelength: base of RoPE; None turns rotation off.
        scaling: see `inverse_wavelengths`.
        dtype: dtype of the tables.

    Attributes:
        memory_key: table `[F, H/2]` for keys of memory rows, as the next block reads them; None without rotation.
        memory_query: table for queries of memory rows, relative to the block that they are about to compress.
    """

    def __init__(
        self, *, head_dim, block_size, fam_length, fam_position, fam_query_position, wavelength, scaling, dtype
    ):
        self.head_dim, self.block_size, self.dtype = head_dim, block_size, dtype
        self.memory_key = self.memory_query = None
        self.inverse = None if wavelength is None else inverse_wavelengths(head_dim, wavelength, scaling)
        if self.inverse is None:
            return
        self._tokens = self._table(np.arange(2 * block_size))
        rows = memory_positions(fam_length, block_size, fam_position)
        self.memory_key = self._table(rows)
        self.memory_query = self._table(rows + (block_size if fam_query_position == "current" else 0))

    def _table(self, places):
        return rotation_table(places, self.inverse, self.dtype)

    def tokens(self, place):
        """Table for int32 `place` (any shape), 0 … 2·S−1, counted from the start of a block."""
        if self.inverse is None:
            return None
        return tuple(ops.take(t, place, axis=0) for t in self._tokens)

    def back(self, blocks):
        """Rotation of keys that stand `blocks` (an int or an array of ints) blocks before where they were written."""
        if self.inverse is None:
            return None
        return self._table(-np.asarray(blocks, "float64") * self.block_size)

    def sinks(self, memory_segments, attention_sinks):
        """Rotation of the keys of the stream's first W tokens, as stored, to the W positions before the window."""
        if self.inverse is None:
            return None
        return self._table(-float(memory_segments * self.block_size + attention_sinks))

    def memory_heads(self, num_queries, num_keys, query_scale):
        """Tables `[F, queries + keys, H]` for `rotate_whole`: queries, scaled, followed by keys. The second table is
        None where nothing is rotated."""

        def spread(query, key, sign):
            parts = [np.concatenate([sign * t, t], axis=-1) for t in (query, key)]
            heads = [np.repeat(t[:, None], n, axis=1) for t, n in zip(parts, (num_queries, num_keys), strict=True)]
            return np.concatenate([heads[0] * query_scale, heads[1]], axis=1).astype(self.dtype)

        if self.inverse is None:
            ones = np.ones((1, self.head_dim // 2))
            return spread(ones, ones, 1), None
        pairs = zip(self.memory_query, self.memory_key, (1, -1), strict=True)
        return tuple(spread(query, key, sign) for query, key, sign in pairs)

"""Rotary positions (RoPE), relative by construction.

Only differences of positions matter, so no absolute position is ever formed: keys are rotated by their place in
their own block, queries by theirs, and what lies between two blocks is one constant rotation. All tables are made
in float64 on the host from small integers and rounded once, so token 10,000,000 has the numerics of token 10.
"""

import math

import numpy as np
from keras import ops

# What each type of `rope_scaling` needs.
SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def inverse_wavelengths(rotary_dim, wavelength=10_000.0, scaling=None):
    """Angular frequencies of RoPE, float64 `[R/2]`.

    Args:
        rotary_dim: R, how many features of a head are rotated, even: all H of them, or the first ones.
        wavelength: base of the geometric progression (10,000 in the paper, App. B.2).
        scaling: None, or a dict with `"type"`: `"linear"` (`factor`), `"llama3"` (`factor`, `low_freq_factor`,
            `high_freq_factor`, `original_max_position_embeddings`) or `"yarn"` (`factor`,
            `original_max_position_embeddings`; by default `beta_fast` 32, `beta_slow` 1 and `truncate` True). The
            temperature that goes with YaRN (Peng et al., 2023, arXiv 2309.00071) is a factor of the logits,
            (0.1 · ln `factor` + 1)², and is left to `attention_scale`.
    """
    if scaling is not None:
        _check_scaling(scaling)
    inverse = float(wavelength) ** (-np.arange(0, rotary_dim, 2, dtype="float64") / rotary_dim)
    if scaling is None:
        return inverse
    kind = scaling["type"]
    if kind == "linear":
        return inverse / float(scaling["factor"])
    if kind == "llama3":
        period = 2 * math.pi / inverse
        context = float(scaling["original_max_position_embeddings"])
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        smooth = np.clip((context / period - low) / (high - low), 0.0, 1.0)
        return inverse * (smooth + (1.0 - smooth) / float(scaling["factor"]))
    return inverse * (1.0 - (1.0 - 1.0 / float(scaling["factor"])) * _yarn_ramp(rotary_dim, wavelength, scaling))


def _check_scaling(scaling):
    if scaling.get("type") not in SCALING:
        raise ValueError(f"`rope_scaling` has a 'type' of 'linear', 'llama3' or 'yarn'; received {scaling!r}.")
    missing = [name for name in SCALING[scaling["type"]] if name not in scaling]
    if missing:
        raise ValueError(
            f"`rope_scaling` of type {scaling['type']!r} needs {', '.join(map(repr, missing))} as well; received "
            f"{scaling!r}."
        )


def _yarn_ramp(rotary_dim, wavelength, scaling):
    """How far each pair is interpolated by YaRN, `[R/2]`: 0 where it turns `beta_fast` times or more within the context
    of training, 1 where it turns `beta_slow` times or less."""

    def pair_that_turns(times):
        length = float(scaling["original_max_position_embeddings"])
        return rotary_dim * math.log(length / (2 * math.pi * times)) / (2 * math.log(wavelength))

    first = pair_that_turns(float(scaling.get("beta_fast", 32.0)))
    last = pair_that_turns(float(scaling.get("beta_slow", 1.0)))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    return np.clip((np.arange(rotary_dim // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)


def rotation_table(positions, inverse, dtype="float32"):
    """Host-side `(cos, sin)` of shape `positions.shape + [R/2]` for known positions.

    Args:
        positions: array of numbers.
        inverse: float64 `[R/2]` from `inverse_wavelengths`.
        dtype: dtype of the returned NumPy arrays.
    """
    angles = np.asarray(positions, "float64")[..., None] * inverse
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rotate(x, table):
    """Rotates the two halves of the last axis of `x`, or of its first R features.

    Args:
        x: `[..., T, heads, H]`.
        table: `(cos, sin)`, each `[..., T, R/2]`, broadcastable over the leading axes; or None for no rotation.

    Returns:
        The rotated tensor, in the dtype of `x`; the arithmetic is float32 or wider.
    """
    if table is None:
        return x
    cos, sin = (ops.expand_dims(ops.convert_to_tensor(t), -2) for t in table)
    width = 2 * cos.shape[-1]
    turning = x if width == x.shape[-1] else x[..., :width]
    first, second = ops.split(ops.cast(turning, cos.dtype), 2, axis=-1)
    rotated = ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = ops.cast(rotated, x.dtype)
    if turning is x:
        return rotated
    still = ops.broadcast_to(x[..., width:], (*ops.shape(rotated)[:-1], x.shape[-1] - width))
    return ops.concatenate([rotated, still], axis=-1)


def rotate_whole(x, table):
    """`rotate` with tables made for whole heads (of `memory_heads`, `window`): few operations, for few rows."""
    cos, sin = table
    wide = ops.cast(x, cos.dtype)
    turned = wide * cos
    if sin is not None:
        width, rest = sin.shape[-1], x.shape[-1] - sin.shape[-1]
        other = ops.roll(wide[..., :width] if rest else wide, width // 2, axis=-1) * sin
        turned = turned + (ops.pad(other, [[0, 0]] * (len(x.shape) - 1) + [[0, rest]]) if rest else other)
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
        rotary_dim: R, the features of a head that are rotated, its first ones; None means H.
        block_size: S.
        fam_length: F.
        fam_position: `"last"` or `"float"`.
        fam_query_position: `"previous"` or `"current"`.
        wavelength: base of RoPE; None turns rotation off.
        scaling: see `inverse_wavelengths`.
        dtype: dtype of the tables.

    Attributes:
        memory_key: table `[F, R/2]` for keys of memory rows, as the next block reads them; None without rotation.
        memory_query: table for queries of memory rows, relative to the block that they are about to compress.
    """

    def __init__(
        self, *, head_dim, block_size, fam_length, fam_position, fam_query_position, wavelength, scaling, dtype,
        rotary_dim=None,
    ):  # fmt: skip
        self.head_dim, self.block_size, self.dtype = head_dim, block_size, dtype
        self.memory_key = self.memory_query = None
        self.inverse = None if wavelength is None else inverse_wavelengths(rotary_dim or head_dim, wavelength, scaling)
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

    def window(self, place, memory_segments):
        """Tables for `rotate_whole` of one token per row, for each of the blocks that it reads.

        Args:
            place: int32 `[B, 1]`, the token's place in its block.
            memory_segments: m.

        Returns:
            `(cos, sin)`, each `[B, 1, m+1, 1, …]`, of H and R features: the own block, which comes last, has the
            rotation by the place, the one j blocks before that by `place + j·S`. None without rotation.
        """
        if self.inverse is None:
            return None
        cos, sin = (ops.expand_dims(ops.expand_dims(t, 2), 2) for t in self.tokens(place))
        blocks = np.arange(memory_segments, -1, -1, dtype="float64")[:, None] * self.block_size
        far_cos, far_sin = (ops.convert_to_tensor(t) for t in self._table(blocks))  # [m+1, 1, R/2]
        cos, sin = cos * far_cos - sin * far_sin, sin * far_cos + cos * far_sin
        parts = [cos, cos]
        if self.head_dim > 2 * len(self.inverse):
            parts.append(ops.ones((*ops.shape(cos)[:-1], self.head_dim - 2 * len(self.inverse)), self.dtype))
        return ops.concatenate(parts, axis=-1), ops.concatenate([-sin, sin], axis=-1)

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
        """Tables for `rotate_whole`, queries, scaled, followed by keys: `[F, queries + keys, H]` for a row itself and
        `[F, queries + keys, R]` for its halves exchanged; None where nothing is rotated."""

        def spread(query, key):
            heads = [np.repeat(t[:, None], n, axis=1) for t, n in ((query, num_queries), (key, num_keys))]
            return np.concatenate([heads[0] * query_scale, heads[1]], axis=1).astype(self.dtype)

        if self.inverse is None:
            ones = np.ones((1, self.head_dim))
            return spread(ones, ones), None
        (query_cos, query_sin), (key_cos, key_sin) = self.memory_query, self.memory_key
        still = np.ones((len(query_cos), self.head_dim - 2 * len(self.inverse)))
        cos = [np.concatenate([t, t, still], axis=-1) for t in (query_cos, key_cos)]
        return spread(*cos), spread(*(np.concatenate([-t, t], axis=-1) for t in (query_sin, key_sin)))

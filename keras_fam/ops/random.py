"""Dropout and noise with the seed as an argument, so that `advance` stays pure in loops and rematerialised steps."""

import keras
from keras import ops

from keras_fam.ops.backend import GivenSeed, wait_for
from keras_fam.ops.processes import row_shard

_BETWEEN_SHARDS = 15_485_863  # so many draws can a generator make before it repeats those of the next shard


def next_seed(generator, x):
    """The next seed `[2]` of a `SeedGenerator` in a step that reads `x`; None without a generator.

    Where processes or replicas see rows of their own, their seeds differ.
    """
    if generator is None:
        return None
    with wait_for(x):
        seed = generator.next()
    shard, count = row_shard()
    if count == 1:
        return seed
    return ops.cast(seed, "int32") + ops.stack([0, ops.cast(shard, "int32") * _BETWEEN_SHARDS])


def fold_in(seed, index):
    """A seed `[2]` derived from `seed` `[2]` and `index` (an int, or int32 `[n]` for `[n, 2]`); None stays None."""
    if seed is None:
        return None
    index = ops.expand_dims(ops.cast(index, "int32") * 1_000_003, -1)
    return ops.cast(seed, "int32") + ops.concatenate([index, ops.zeros_like(index)], axis=-1)


def dropout(x, rate, seed):
    """`x` with a fraction `rate` of its entries set to 0 and the rest scaled up; unchanged if `seed` is None."""
    if seed is None or not rate:
        return x
    return keras.random.dropout(x, rate, seed=GivenSeed(seed))


def noise(shape, dtype, seed):
    """Standard normal noise."""
    return keras.random.normal(shape, dtype=keras.backend.standardize_dtype(dtype), seed=GivenSeed(seed))

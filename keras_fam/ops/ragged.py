"""Rows of different lengths: gathering per row, and squeezing padding out so that only real tokens are a stream."""

from keras import ops

from keras_fam.ops.backend import indices


def gather(x, index):
    """Takes `index[b, j]` along axis 1 of each row.

    Args:
        x: `[B, L, ...]`.
        index: int32 `[B, J]`, each entry in 0 … L−1.

    Returns:
        `[B, J, ...]`.
    """
    shape = ops.shape(x)
    batch_size, length, rest = shape[0], shape[1], shape[2:]
    flat = ops.reshape(x, (-1, *rest))
    index = index + ops.expand_dims(indices(batch_size) * length, 1)
    taken = ops.take(flat, ops.reshape(index, (-1,)), axis=0)
    return ops.reshape(taken, (-1, ops.shape(index)[1], *rest))


def pack_left(x, padding_mask):
    """Moves the real tokens of each row to its front.

    Args:
        x: `[B, T, ...]`.
        padding_mask: bool `[B, T]`, True at real tokens.

    Returns:
        `(x, lengths)`: the tokens in order and int32 `[B]`; what stands behind a row's length is arbitrary.
    """
    padding_mask = ops.cast(padding_mask, "bool")
    length = ops.shape(x)[1]
    place = indices(length)
    order = ops.argsort(ops.where(padding_mask, place, place + length), axis=1)
    lengths = ops.sum(ops.cast(padding_mask, "int32"), axis=1)
    return gather(x, ops.cast(order, "int32")), lengths


def unpack_left(y, padding_mask):
    """Undoes `pack_left` for outputs `[B, T, ...]`; what stands at padding becomes 0."""
    padding_mask = ops.cast(padding_mask, "bool")
    place = ops.cumsum(ops.cast(padding_mask, "int32"), axis=1) - 1
    return zero_rows(gather(y, ops.maximum(place, 0)), padding_mask)


def zero_rows(x, keep):
    """`x` `[B, T, ...]` with exact zeros where `keep` `[B, T]` is False, whatever stood there (NaN included)."""
    keep = ops.reshape(keep, (*ops.shape(keep), *(1,) * (len(x.shape) - 2)))
    return ops.where(keep, x, ops.zeros((), x.dtype))

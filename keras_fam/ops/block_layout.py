"""Laying tokens out in blocks, and keeping the last ones for the next call.

`held` are the `[B, (m+1)·S, …]` slots of a `LayerState`; `blocks` are `[B, m+n, S, …]`: the m previous blocks and the
n blocks that a call touches, of which the first may hold tokens of earlier calls.
"""

from keras import ops

from keras_fam.ops.backend import indices
from keras_fam.ops.ragged import gather, zero_rows


def to_blocks(x, block_size, num_blocks):
    """`[B, T, …]` as `[B, n, S, …]`, zeros behind the last token."""
    length = ops.shape(x)[1]
    if not (isinstance(length, int) and length % block_size == 0):
        x = ops.pad(x, [[0, 0], [0, num_blocks * block_size - length]] + [[0, 0]] * (len(x.shape) - 2))
    return ops.reshape(x, (-1, num_blocks, block_size, *x.shape[2:]))


def with_segments(held, current, segments, block_size):
    """The held segments before the blocks of a call: `[B, n, S, …]` to `[B, segments+n, S, …]`."""
    if not segments:
        return current
    end = held.shape[1] - block_size
    past = held[:, end - segments * block_size : end]
    past = ops.reshape(past, (-1, segments, block_size, *held.shape[2:]))
    return ops.concatenate([past, current], axis=1)


def lay_out(held, new, offset, lengths, block_size, num_blocks):
    """Blocks of a call in which rows stand anywhere.

    Args:
        held: `[B, (m+1)·S, …]`.
        new: `[B, T, …]`.
        offset: int32 `[B]`, tokens already in each row's unfinished block.
        lengths: int or int32 `[B]`, how many of the T new tokens exist.
        block_size: S.
        num_blocks: n.

    Returns:
        `[B, m+n, S, …]`, zeros behind the last token.
    """
    segments = held.shape[1] // block_size - 1
    rest = tuple(held.shape[2:])
    if new.shape[1] == 1:
        # One token goes straight to its slot; an absent one writes the zeros that stand there.
        row = indices(ops.shape(new)[0])
        slot = ops.stack([row, offset + segments * block_size], axis=1)
        held = ops.scatter_update(held, slot, new[:, 0])
        return ops.reshape(held, (-1, segments + 1, block_size, *rest))
    offset = ops.expand_dims(offset, 1)
    slot = ops.expand_dims(indices(num_blocks * block_size), 0)
    place = slot - offset
    last = ops.shape(new)[1] - 1
    source = ops.where(place < 0, ops.minimum(slot, block_size - 1), block_size + ops.clip(place, 0, last))
    end = ops.expand_dims(lengths, 1) if len(getattr(lengths, "shape", ())) else lengths
    current = gather(ops.concatenate([held[:, segments * block_size :], new], axis=1), source)
    current = ops.reshape(zero_rows(current, place < end), (-1, num_blocks, block_size, *rest))
    return with_segments(held, current, segments, block_size)


def to_slots(blocks):
    """`[B, n, S, …]` as `[B, n·S, …]`."""
    shape = ops.shape(blocks)
    return ops.reshape(blocks, (-1, shape[1] * shape[2], *shape[3:]))


def place_queries(query, offset, block_size, num_blocks):
    """Queries `[B, T, N, H]` of rows that stand anywhere, as `[B, n, S, N, H]`; other slots hold arbitrary queries."""
    slot = ops.expand_dims(indices(num_blocks * block_size), 0)
    source = ops.clip(slot - ops.expand_dims(offset, 1), 0, ops.shape(query)[1] - 1)
    return ops.reshape(gather(query, source), (-1, num_blocks, block_size, *query.shape[2:]))


def read_back(placed, offset, length):
    """Outputs `[B, n, S, …]` of `place_queries` back to their tokens, `[B, T, …]`."""
    return gather(to_slots(placed), ops.expand_dims(offset, 1) + indices(length))


def keep_last(blocks, completed, segments):
    """The slots to hold for the next call: the last m completed blocks and the unfinished one.

    Args:
        blocks: `[B, m+n, S, …]`.
        completed: blocks that were filled, 0 … n: an int for all rows, or int32 `[B]`.
        segments: m.

    Returns:
        `[B, (m+1)·S, …]`.
    """
    shape = ops.shape(blocks)
    blocks = ops.concatenate([blocks, ops.zeros((shape[0], 1, *shape[2:]), blocks.dtype)], axis=1)
    if isinstance(completed, int):
        kept = blocks[:, completed : completed + segments + 1]
    else:
        kept = gather(blocks, ops.expand_dims(completed, 1) + indices(segments + 1))
    return ops.reshape(kept, (-1, (segments + 1) * shape[2], *shape[3:]))

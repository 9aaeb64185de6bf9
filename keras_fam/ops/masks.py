"""Who sees whom, from positions alone (Fig. 1, Alg. 1 and 2). The layers and the plots use these very functions.

A token sees every key of the m previous blocks, all rows of the visible memories, and its own block up to itself.
`attention_window` narrows that to a fixed number of keys (plain sliding window, Transformer-XL).
"""

import numpy as np
from keras import ops


def _constant(numbers):
    return ops.convert_to_tensor(numbers, "int32")


def token_window(block_size, segments, attention_window=None):
    """Static part of what a token sees: its own block causally and `segments` previous blocks.

    Args:
        block_size: S.
        segments: how many previous blocks stand before the own one.
        attention_window: None, or the number of keys a token may see, itself included.

    Returns:
        NumPy bool `[S, (segments+1)·S]`, oldest key first.
    """
    query = np.arange(block_size)[:, None] + segments * block_size
    key = np.arange((segments + 1) * block_size)[None, :]
    mask = key <= query
    if attention_window is not None:
        mask &= key > query - attention_window
    return mask


def filled_segments(block_index, num_blocks, segments, block_size):
    """Which slots of the previous blocks are filled, for the blocks of one call.

    Args:
        block_index: int32 `[B]`, blocks completed before the call.
        num_blocks: n, blocks in the call.
        segments: previous blocks in a window.
        block_size: S.

    Returns:
        bool `[B, n, (segments+1)·S]`; the own block is always True.
    """
    age = _constant(np.repeat(np.arange(segments, -1, -1), block_size))
    seen = ops.expand_dims(block_index, 1) + ops.arange(num_blocks, dtype="int32")
    return ops.expand_dims(seen, -1) >= age


def visible_memories(count, fam_length, max_visible):
    """Which memory rows may be read.

    Args:
        count: int32 `[B, n]`, how many memories may be read in each block.
        fam_length: F.
        max_visible: P.

    Returns:
        bool `[B, n, P·F]`, newest memory first.
    """
    slot = _constant(np.repeat(np.arange(max_visible), fam_length))
    return ops.expand_dims(count, -1) > slot


def slot_visibility(position, block_index, segments, num_blocks, block_size, attention_window=None):
    """What tokens at any place see of the slots of m previous blocks and `num_blocks` blocks of the call.

    Args:
        position: int32 `[B, T]`, places of the tokens relative to the start of the row's unfinished block.
        block_index: int32 `[B]`, blocks completed before the call.
        segments: m.
        num_blocks: n, blocks that the call may touch.
        block_size: S.
        attention_window: as in `token_window`.

    Returns:
        bool `[B, T, m+n, S]`.
    """
    block = np.arange(-segments, num_blocks)[:, None]
    slot = _constant(block * block_size + np.arange(block_size))
    block = _constant(block)
    query = position[:, :, None, None]
    own = ops.floor_divide(query, block_size)
    mask = ops.logical_and(slot <= query, block >= own - segments)
    mask = ops.logical_and(mask, block + block_index[:, None, None, None] >= 0)
    if attention_window is not None:
        mask = ops.logical_and(mask, slot > query - attention_window)
    return mask


def own_block(position, segments, num_blocks, block_size):
    """Which of the m+n blocks of `slot_visibility` is each token's own: bool `[B, T, m+n]`."""
    block = _constant(np.arange(-segments, num_blocks))
    return ops.expand_dims(ops.floor_divide(position, block_size), -1) == block


def slot_memories(position, visible, num_blocks, block_size, fam_length, max_visible):
    """Which memory rows tokens at any place may read: those written before their own block.

    Args:
        position: int32 `[B, T]`, as in `slot_visibility`.
        visible: int32 `[B]`, memories readable in the first block.
        num_blocks: n.
        block_size: S.
        fam_length: F.
        max_visible: P.

    Returns:
        bool `[B, T, n, P·F]`.
    """
    block = _constant(np.arange(num_blocks))
    rows = visible_memories(ops.expand_dims(visible, 1) + block, fam_length, max_visible)
    own = own_block(position, 0, num_blocks, block_size)
    return ops.logical_and(ops.expand_dims(own, -1), ops.expand_dims(rows, 1))


def join(first, second, first_width, second_width):
    """Which keys exist, side by side: bool `[B, n, first_width]` and `[B, n, second_width]`; None stands for all."""
    if first is None and second is None:
        return None

    def all_of(width, other):
        return ops.logical_or(ops.ones((width,), "bool"), other[..., :1])

    first = all_of(first_width, second) if first is None else first
    second = all_of(second_width, first) if second is None else second
    return ops.concatenate([first, second], axis=-1)

"""One attention layer over one chunk of a stream, for any number of blocks (Alg. 1 and 2).

1. `project_tokens`: all tokens at once, rotated by their place in their block; keys and values laid out in blocks.
2. `scan_memory` (`memory_scan.py`): over the blocks that the chunk completes, memory rows only.
3. `attend_tokens`: all tokens at once over memory, memory segments and own block.
4. `keep_keys`: the last keys and values, for the next call.

Axes: B rows, T tokens, S block, n blocks in the chunk, m segments, F memory rows, P visible memories, N query heads,
K key/value heads, H head width, D model width.
"""

import numpy as np
from keras import ops

from keras_fam.layers.memory_scan import memory_ages
from keras_fam.ops import block_layout, masks
from keras_fam.ops.attention import attend_blocks, attend_slots
from keras_fam.ops.rope import rotate
from keras_fam.ops.scan import branch


def forward_chunk(layer, x, state, position, chunk, *, seed=None, initial_rows=None):
    """One layer over a chunk: the path of a token.

    Args:
        layer: a `RecurrentLayer`, whose functions around the attention are used.
        x: `[B, T, D]`.
        state: `LayerState` of B rows.
        position: `StreamPosition` of B rows, or of one row that stands for all.
        chunk: `Chunk`.
        seed: None, or an integer tensor `[2]` for dropout and noise.
        initial_rows: `[1 or B, F, D]`, for `initial_fam="summary"`: memory rows that pass up the layers with block 1.

    Returns:
        `(y, state, initial_rows)`: `[B, T, D]`; the new `LayerState`, None unless `chunk.keep_state`; the rows for the
        layer above.
    """
    x = chunk.zero_padding(x)
    query, keys, values = project_tokens(layer, x, state, position, chunk)
    memory = None
    if layer.fam_length:
        memory, state, initial_rows = layer.scan_memory(
            state, position, keys, values, chunk, seed=seed, initial_rows=initial_rows
        )
    attended = attend_tokens(layer.attention_layer(), query, keys, values, memory, position, chunk)
    y = layer.token_output(attended, x, seed)
    state = keep_keys(layer.attention_layer(), state, keys, values, chunk) if chunk.keep_state else None
    return y, state, initial_rows


def project_tokens(layer, x, state, position, chunk):
    """Queries, keys and values of the tokens, and the keys and values that the layer holds.

    Returns:
        `(query, keys, values)`: `[B, T, N, H]`, scaled and rotated by place in block (of a positional chunk: in the
        row's first block), and `[B, m+n, S, K, H]` each, rotated by place in block: the m held blocks and the n blocks
        of the chunk, the first of which may hold tokens of earlier calls.
    """
    attention = layer.attention_layer()
    S, m = attention.block_size, attention.memory_segments
    normed = layer.pre_norm(x)
    query, (key, value) = attention.project_query(normed), attention.project_key_value(normed)
    key, value = chunk.zero_padding(key), chunk.zero_padding(value)  # a bias makes keys of zeros
    table = attention.positions.tokens(ops.mod(chunk.position, S))
    query = rotate(query, attention.positions.tokens(chunk.position) if chunk.positional else table)
    key = rotate(key, table)
    if chunk.aligned:
        keys, values = (
            block_layout.with_segments(held, block_layout.to_blocks(new, S, chunk.num_blocks), m, S)
            for held, new in ((state.key, key), (state.value, value))
        )
    else:
        keys, values = (
            block_layout.lay_out(held, new, position.offset, chunk.taken, S, chunk.num_blocks)
            for held, new in ((state.key, key), (state.value, value))
        )
    return query, keys, values


def attend_tokens(attention, query, keys, values, memory, position, chunk):
    """What the tokens of a chunk read.

    Args:
        attention: a `FeedbackAttention`.
        query, keys, values: of `project_tokens`.
        memory: None, or the keys and values `[B, n, P·F, K, H]` of the memories that the tokens of each block see.
        position: `StreamPosition` before the chunk.
        chunk: `Chunk`.

    Returns:
        `[B, T, N, H]`.
    """
    attend = _attend_positions if chunk.positional else _attend_whole_blocks
    return attend(attention, query, keys, values, memory, position, chunk)


def keep_keys(attention, state, keys, values, chunk):
    """The `LayerState` with the keys and values to hold for the next call: m blocks and the unfinished one."""

    def shifted():
        m, completed = attention.memory_segments, chunk.completed
        if chunk.uniform and isinstance(chunk.length, int):
            completed = chunk.length // attention.block_size
        return tuple(block_layout.keep_last(part, completed, m) for part in (keys, values))

    if chunk.one_block:  # mostly, no block is completed and nothing moves
        in_place = lambda: tuple(map(block_layout.to_slots, (keys, values)))  # noqa: E731
        key, value = branch(ops.any(chunk.completed > 0), shifted, in_place)
    else:
        key, value = shifted()
    return state._replace(key=key, value=value)


def _attend_whole_blocks(attention, query, keys, values, memory, position, chunk):
    """Whole blocks: one mask for all of them, narrowed to the keys that exist."""
    S, num_blocks = attention.block_size, chunk.num_blocks
    segments = chunk.visible_segments(attention.memory_segments)
    if chunk.aligned:
        query = block_layout.to_blocks(query, S, num_blocks)
    else:
        query = block_layout.place_queries(query, position.offset, S, num_blocks)
    places = np.arange(-segments * S, S, dtype="int32")  # of the keys, counted from the start of their queries' block
    mask = attention.visible(np.arange(S)[:, None], places)
    existing = {}  # per block, bool [1 or B, 1 or n, …] of keys that may not exist
    if segments:
        key = ops.expand_dims(chunk.block_offsets, 1) * S + ops.convert_to_tensor(places)  # [n, (m+1)·S]
        existing["tokens"] = masks.exists(key, position.block_index[:, None, None], S)
    if memory is not None:
        age = memory_ages(attention)
        mask = np.concatenate([np.ones((S, len(age)), bool), mask], axis=1)
        if attention.num_visible_memories > 1 or attention.initial_fam == "summary":
            count = ops.expand_dims(position.visible_memories, 1) + chunk.block_offsets
            existing["memory"] = masks.memory_visible(ops.expand_dims(count, -1), ops.convert_to_tensor(age))
        if existing:
            always = {"memory": ops.ones((1, 1, len(age)), "bool"), "tokens": ops.ones((1, 1, len(places)), "bool")}
            existing = {**always, **existing}
    attended = attend_blocks(
        query,
        keys[:, attention.memory_segments - segments :],
        values[:, attention.memory_segments - segments :],
        *(memory or (None, None)),
        mask,
        segments=segments,
        back=attention.positions.back,
        visible=_side_by_side([*existing.values()]),
        softcap=attention.attention_softcap,
        stop_gradient=attention.stop_memory_gradient,
    )
    if chunk.aligned:
        return block_layout.to_slots(attended)[:, : chunk.length]
    return block_layout.read_back(attended, position.offset, chunk.length)


def _side_by_side(parts):
    """bool `[1 or B, 1 or n, W]` parts next to one another; None for none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    whole = ops.logical_or(*(part[..., :1] for part in parts))
    return ops.concatenate([ops.logical_and(part, ops.ones_like(whole)) for part in parts], axis=-1)


def _attend_positions(attention, query, keys, values, memory, position, chunk):
    """A few tokens at any position: visibility from the position of each token."""
    S, m, num_blocks = attention.block_size, attention.memory_segments, chunk.num_blocks
    token = ops.expand_dims(chunk.position, -1)  # [B, T, 1]
    places = ops.convert_to_tensor(np.arange(-m * S, num_blocks * S, dtype="int32"))
    mask = attention.visible(token, places)
    mask = ops.logical_and(mask, masks.exists(places, position.block_index[:, None, None], S))
    block = ops.convert_to_tensor(np.arange(-m, num_blocks, dtype="int32"))
    own = ops.equal(ops.floor_divide(token, S), block)  # [B, T, m+n]
    if memory is not None:
        age = memory_ages(attention)
        count = ops.expand_dims(position.visible_memories, 1) + chunk.block_offsets  # [B, n]
        rows = masks.memory_visible(ops.expand_dims(count, -1), ops.convert_to_tensor(age))  # [B, n, P·F]
        rows = ops.logical_and(ops.expand_dims(own[:, :, m:], -1), ops.expand_dims(rows, 1))
        rows = ops.reshape(rows, (*ops.shape(mask)[:2], num_blocks * len(age)))
        mask = ops.concatenate([rows, mask], axis=-1)
    return attend_slots(
        query,
        keys,
        values,
        *(memory or (None, None)),
        mask,
        segments=m,
        own=own,
        back=attention.positions.back,
        softcap=attention.attention_softcap,
        stop_gradient=attention.stop_memory_gradient,
    )

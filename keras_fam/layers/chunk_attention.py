"""One attention layer over one chunk of a stream, for any number of blocks (Alg. 1 and 2).

1. `project_tokens`: all tokens at once, rotated by their place in their block; keys and values laid out in blocks.
2. `keep_sinks`, where the stream begins; `scan_memory` (`memory_scan.py`): over the blocks that the chunk completes,
   memory rows only.
3. `attend_tokens`: all tokens at once over memory, memory segments and own block.
4. `keep_keys`: the last keys and values, for the next call.

Axes: B rows, T tokens, S block, n blocks in the chunk, m segments, F memory rows, P visible memories, N query heads,
K key/value heads, H head width, D model width.
"""

import contextlib
import threading
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_fam.layers.fast_call import reading_tokens
from keras_fam.layers.memory_scan import memory_ages
from keras_fam.ops import block_layout, masks
from keras_fam.ops.block_attention import attend_blocks, attend_slots
from keras_fam.ops.key_bias import KeyBias
from keras_fam.ops.rope import rotate, rotate_whole
from keras_fam.state import where_rows

_local = threading.local()


@contextlib.contextmanager
def closed_memory():
    """In this thread, inside, tokens read no memory, as with `fam_gate=float("-inf")`. It is still written."""
    before = getattr(_local, "closed", False)
    _local.closed = True
    try:
        yield
    finally:
        _local.closed = before


def forward_chunk(layer, x, state, position, chunk, *, seed=None, rows_below=None):
    """One layer over a chunk: the path of a token.

    Args:
        layer: a `RecurrentLayer`, whose functions around the attention are used.
        x: `[B, T, D]`.
        state: `LayerState` of B rows.
        position: `StreamPosition` of B rows, or of one row that stands for all.
        chunk: `Chunk`.
        seed: None, or an integer tensor `[2]` for dropout and noise.
        rows_below: what the layer below made of the memory rows, or the model's memory prompt: None; `[1 or B, F, D]`
            in block 1, for `initial_fam="summary"`; `[1 or B, 1 or n, F, D]` in each block that the chunk completes,
            for `fam_query="anchored"`.

    Returns:
        `(y, state, rows_below)`: `[B, T, D]`; the new `LayerState`, None unless `chunk.keep_state`; the rows for the
        layer above.
    """
    attention, memory = layer.attention_layer(), None
    x = chunk.zero_padding(x)
    with reading_tokens():
        query, keys, values = project_tokens(layer, x, state, position, chunk)
    state = keep_sinks(attention, state, keys, values, position)
    if layer.fam_length:
        memory, state, rows_below = layer.scan_memory(
            state, position, keys, values, chunk, seed=seed, rows_below=rows_below
        )
    rows = rows_to_read(attention, state, memory, position, chunk)
    attended = attend_tokens(attention, query, keys, values, rows, position, chunk)
    with reading_tokens():
        y = layer.token_output(attended, x, seed)
    state = keep_keys(attention, state, keys, values, chunk) if chunk.keep_state else None
    return y, state, rows_below


def project_tokens(layer, x, state, position, chunk):
    """Queries, keys and values of the tokens, and the keys and values that the layer holds.

    Returns:
        `(query, keys, values)`: `[B, T, N, H]`, scaled and rotated by place in block (of a positional chunk: in the
        row's first block; of one token: `[B, 1, m+1, N, H]`, rotated for each block that it reads), and
        `[B, m+n, S, K, H]` each, rotated by place in block: the m held blocks and the n blocks of the chunk, the first
        of which may hold tokens of earlier calls.
    """
    attention = layer.attention_layer()
    S, m = attention.block_size, attention.memory_segments
    normed = layer.pre_norm(x)
    query, (key, value) = attention.project_query(normed), attention.project_key_value(normed)
    if chunk.one_block:
        query, key = _rotate_token(attention, query, key, chunk.position)
    else:
        table = attention.positions.tokens(ops.mod(chunk.position, S))
        query = rotate(query, attention.positions.tokens(chunk.position) if chunk.positional else table)
        key = rotate(key, table)
    key, value = chunk.zero_padding(key), chunk.zero_padding(value)  # a bias makes keys of zeros
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


def _rotate_token(attention, query, key, place):
    """Query and key of one token per row: the query for each of the m+1 blocks that it reads, `[B, 1, m+1, N, H]`, the
    key by its place, `[B, 1, K, H]`; in one rotation for all."""
    m, heads = attention.memory_segments, attention.num_query_heads
    table = attention.positions.window(place, m)
    if table is None:
        return ops.repeat(ops.expand_dims(query, 2), m + 1, axis=2), key
    turned = rotate_whole(ops.expand_dims(ops.concatenate([query, key], axis=2), 2), table)
    return turned[:, :, :, :heads], turned[:, :, m, heads:]


class Rows(NamedTuple):
    """What the tokens of a block read beside tokens: attention sinks and memory rows, R of them.

    Attributes:
        key: `[B, n, R, K, H]`, rotated for readers in the block.
        value: `[B, n, R, K, H]`.
        seen: None where all of them exist, or bool `[1 or B, n, R]`.
        bias: None, or a `KeyBias` over the R of them (`fam_gate`).
    """

    key: Any
    value: Any
    seen: Any
    bias: Any = None


def keep_sinks(attention, state, keys, values, position):
    """The `LayerState` with the keys and values of the stream's first W tokens, where the chunk brings them."""
    W, m = attention.attention_sinks, attention.memory_segments
    if not W:
        return state
    first = position.block_index == 0  # then the chunk's first block is the stream's
    sinks = where_rows(first, (keys[:, m, :W], values[:, m, :W]), (state.sink_key, state.sink_value))
    return state._replace(sink_key=sinks[0], sink_value=sinks[1])


def rows_to_read(attention, state, memory, position, chunk):
    """The `Rows` that the tokens of each block read, or None.

    Args:
        attention: a `FeedbackAttention`.
        state: `LayerState`, its sinks those of the chunk.
        memory: None, or the keys and values `[B, n, P·F, K, H]` of the memories that the tokens of each block see.
        position: `StreamPosition` before the chunk.
        chunk: `Chunk`.
    """
    parts, n, bias = [], chunk.num_blocks, None
    if attention.memory_is_closed or getattr(_local, "closed", False):
        memory = None
    if attention.attention_sinks:
        sinks = attention.sinks(state)
        if attention.stop_memory_gradient:
            sinks = tuple(map(ops.stop_gradient, sinks))
        key, value = (ops.repeat(ops.expand_dims(part, 1), n, axis=1) for part in sinks)
        block = ops.expand_dims(position.block_index, 1) + chunk.block_offsets
        seen = masks.sink_visible(ops.expand_dims(block, -1), attention.memory_segments)
        parts.append((key, value, ops.repeat(seen, attention.attention_sinks, axis=2)))
    if memory is not None:
        age, seen = memory_ages(attention), None
        if attention.num_visible_memories > 1 or attention.initial_fam == "summary":
            count = ops.expand_dims(position.visible_memories, 1) + chunk.block_offsets
            seen = masks.memory_visible(ops.expand_dims(count, -1), ops.convert_to_tensor(age))
        elif parts:
            seen = ops.ones((1, 1, len(age)), "bool")
        parts.append((*memory, seen))
        if attention.gate_bias is not None:
            keys = np.arange(attention.attention_sinks + len(age)) >= attention.attention_sinks
            bias = KeyBias(ops.convert_to_tensor(attention.gate_bias), keys)
    if len(parts) < 2:
        return Rows(*parts[0], bias) if parts else None
    key, value = (ops.concatenate(pair, axis=2) for pair in zip(parts[0][:2], parts[1][:2], strict=True))
    return Rows(key, value, _side_by_side([part[2] for part in parts]), bias)


def attend_tokens(attention, query, keys, values, rows, position, chunk):
    """What the tokens of a chunk read.

    Args:
        attention: a `FeedbackAttention`.
        query, keys, values: of `project_tokens`.
        rows: None, or `Rows`.
        position: `StreamPosition` before the chunk.
        chunk: `Chunk`.

    Returns:
        `[B, T, N, H]`.
    """
    attend = _attend_positions if chunk.positional else _attend_whole_blocks
    return attend(attention, query, keys, values, rows, position, chunk)


def keep_keys(attention, state, keys, values, chunk):
    """The `LayerState` with the keys and values to hold for the next call: m blocks and the unfinished one."""

    def shifted():
        m, completed = attention.memory_segments, chunk.completed
        if chunk.uniform and isinstance(chunk.length, int):
            completed = chunk.length // attention.block_size
        return tuple(block_layout.keep_last(part, completed, m) for part in (keys, values))

    if chunk.one_block:  # mostly, no block is completed and nothing moves
        in_place = lambda: tuple(map(block_layout.to_slots, (keys, values)))  # noqa: E731
        key, value = chunk.on_completion(shifted, in_place)
    else:
        key, value = shifted()
    return state._replace(key=key, value=value)


def _attend_whole_blocks(attention, query, keys, values, rows, position, chunk):
    """Whole blocks: one mask for all of them, narrowed to the keys that exist."""
    S, num_blocks = attention.block_size, chunk.num_blocks
    segments = chunk.visible_segments(attention.memory_segments)
    if chunk.aligned:
        query = block_layout.to_blocks(query, S, num_blocks)
    else:
        query = block_layout.place_queries(query, position.offset, S, num_blocks)
    places = np.arange(-segments * S, S, dtype="int32")  # of the keys, counted from the start of their queries' block
    mask = attention.visible(np.arange(S)[:, None], places)
    tokens = None
    if segments:
        key = ops.expand_dims(chunk.block_offsets, 1) * S + ops.convert_to_tensor(places)  # [n, (m+1)·S]
        tokens = masks.exists(key, position.block_index[:, None, None], S)
    seen = tokens
    if rows is not None:
        count = rows.key.shape[2]
        mask = np.concatenate([np.ones((S, count), bool), mask], axis=1)
        if rows.seen is not None or tokens is not None:
            always = [ops.ones((1, 1, size), "bool") for size in (count, len(places))]
            parts = [own if part is None else part for own, part in zip(always, (rows.seen, tokens), strict=True)]
            seen = _side_by_side(parts)
    attended = attend_blocks(
        query,
        keys[:, attention.memory_segments - segments :],
        values[:, attention.memory_segments - segments :],
        *((None, None) if rows is None else rows[:2]),
        mask,
        segments=segments,
        back=attention.positions.back,
        visible=seen,
        **attention.softmax_settings,
        bias=None if rows is None else rows.bias,
        stop_gradient=attention.stop_memory_gradient,
        sinks=attention.attention_sinks,
        whole_windows=attention.attention_window is None and attention.num_visible_memories == 1,
    )
    if chunk.aligned:
        return block_layout.to_slots(attended)[:, : chunk.length]
    return block_layout.read_back(attended, position.offset, chunk.length)


def _side_by_side(parts):
    """Two bool `[1 or B, 1 or n, …]` next to one another."""
    whole = ops.logical_or(*(part[..., :1] for part in parts))
    return ops.concatenate([ops.logical_and(part, ops.ones_like(whole)) for part in parts], axis=-1)


def _attend_positions(attention, query, keys, values, rows, position, chunk):
    """A few tokens at any position: visibility from the position of each token."""
    S, m, num_blocks = attention.block_size, attention.memory_segments, chunk.num_blocks
    token = ops.expand_dims(chunk.position, -1)  # [B, T, 1]
    places = ops.convert_to_tensor(np.arange(-m * S, num_blocks * S, dtype="int32"))
    mask = attention.visible(token, places, own_block=0 if chunk.one_block else None)
    mask = ops.logical_and(mask, masks.exists(places, position.block_index[:, None, None], S))
    block = np.arange(-m, num_blocks, dtype="int32")
    if chunk.one_block:
        own = ops.convert_to_tensor(np.equal(0, block)[None, None])
    else:
        own = ops.equal(ops.floor_divide(token, S), ops.convert_to_tensor(block))  # [B or 1, T, m+n]
    if rows is not None:  # those of each token's own block
        count = rows.key.shape[2]
        seen = ops.ones((1, 1, 1, count), "bool") if rows.seen is None else ops.expand_dims(rows.seen, 1)
        if not chunk.one_block:
            seen = ops.logical_and(ops.expand_dims(own[:, :, m:], -1), seen)  # [B, T, n, R]
        seen = ops.broadcast_to(seen, (*ops.shape(mask)[:2], num_blocks, count))
        mask = ops.concatenate([ops.reshape(seen, (*ops.shape(mask)[:2], num_blocks * count)), mask], axis=-1)
    return attend_slots(
        query,
        keys,
        values,
        *((None, None) if rows is None else rows[:2]),
        mask,
        segments=m,
        own=own,
        back=None if chunk.one_block else attention.positions.back,
        **attention.softmax_settings,
        bias=None if rows is None else rows.bias,
        stop_gradient=attention.stop_memory_gradient,
    )

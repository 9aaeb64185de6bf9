"""Reading a part of a stream with one attention layer, for any number of blocks.

1. Project all tokens, rotate them by their place in their block, and lay keys and values out in blocks.
2. Scan over the completed blocks, memory rows only (`feedback.py`).
3. Attend for all tokens at once: memories, memory segments, own block (block by block where the segments hold outputs,
   `output_segments.py`).
4. Keep the last keys for the next call.

Axes: B rows, T tokens, S block, n blocks in the call, m segments, F memory rows, P visible memories.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_fam.baselines.feedback_memory import keep_outputs, lay_out_outputs, read_in_turn
from keras_fam.layers.memory_scan import write_memories
from keras_fam.ops import block_layout as block_ops
from keras_fam.ops import masks
from keras_fam.ops import ragged as row_ops
from keras_fam.ops.attention import attend_blocks, attend_slots
from keras_fam.ops.rope import rotate
from keras_fam.ops.scan import branch
from keras_fam.state import advance_position


def no_norm(x):
    return x


def attended_alone(attended, residual, seed=None):
    return attended


def add(attended, residual, seed=None):
    return residual + ops.cast(attended, residual.dtype)


class Hooks(NamedTuple):
    """What a layer does around its attention; the defaults are those of an attention layer that stands alone.

    Attributes:
        norm: `x -> x`, applied to tokens and memory rows before they are projected.
        transform: `(attended, x, seed) -> y` for tokens.
        write: `(attended, residual, seed) -> fam` for memory rows.
        seed: None, or an integer tensor `[2]` for dropout and noise.
    """

    norm: Callable = no_norm
    transform: Callable = attended_alone
    write: Callable = add
    seed: Any = None


class _Plan(NamedTuple):
    """How the tokens of a call lie in blocks. Numbers are ints unless T is known at run time only (TensorFlow).

    Attributes:
        aligned: whether every row starts at the start of a block.
        in_slots: whether the tokens are so few that they are attended to without filling blocks.
        num_blocks: n, blocks that the tokens may touch.
        num_updates: how many of them may be completed (and be of use).
        place: int32 `[T]` or `[B, T]`, place of the tokens, counted from the start of their row's first block.
        segments: how many previous blocks the tokens of the call can see.
    """

    aligned: bool
    in_slots: bool
    num_blocks: Any
    num_updates: Any
    place: Any
    segments: int


def _plan(length, layer, position, start, keep_state):
    S, m = layer.block_size, layer.memory_segments
    aligned, static = start != "anywhere", isinstance(length, int)
    place = ops.arange(length, dtype="int32")
    if aligned:
        num_blocks, num_updates = (length + S - 1) // S, length // S
    else:
        num_blocks, num_updates = (length + 2 * S - 2) // S, (length + S - 1) // S
        place = ops.expand_dims(position.offset, 1) + place
    if static and not keep_state:  # no token of the call reads what the last block writes
        num_updates = min(num_updates, num_blocks - 1)
    segments = min(m, num_blocks - 1) if start == "fresh" and static else m
    return _Plan(aligned, static and not aligned and length <= S, num_blocks, num_updates, place, segments)


def advance_layer(layer, x, state, position, hooks, *, start, lengths=None, rider=None, keep_state=True):
    """One layer's part of `advance`.

    Args:
        layer: a `FeedbackAttention`.
        x: `[B, T, D]`.
        state: `LayerState` of B rows.
        position: `StreamPosition` of B rows, or of one row that stands for all.
        hooks: `Hooks`.
        start: what is known when the program is made: `"fresh"` (every row starts anew), `"boundary"` (every row with
            tokens stands at the start of a block) or `"anywhere"`.
        lengths: None, or int32 `[B]`, how many of the T tokens exist.
        rider: `[1 or B, F, D]`, the rows that ride up with block 1 (`initial_fam="summary"`).
        keep_state: False leaves out what only the next call would need.

    Returns:
        `(y, state, rider)`: `[B, T, D]`; the new `LayerState`, None unless `keep_state`; the rows that ride on.
    """
    S, m = layer.block_size, layer.memory_segments
    length = ops.shape(x)[1]
    plan = _plan(length, layer, position, start, keep_state)
    if (
        layer.segment_source == "outputs" and plan.in_slots and plan.num_blocks > 1
    ):  # a block needs the outputs of the one before
        plan = plan._replace(in_slots=False)
    taken = length if lengths is None else lengths
    _, completed = advance_position(position, taken, S, layer.max_memories)
    real = None
    if lengths is not None:
        real = ops.arange(length, dtype="int32") < ops.expand_dims(lengths, 1)
        x = row_ops.zero_rows(x, real)

    normed = hooks.norm(x)
    query, (key, value) = layer.project_query(normed), layer.project_key_value(normed)
    if real is not None:
        key, value = row_ops.zero_rows(key, real), row_ops.zero_rows(value, real)
    table = layer.positions.tokens(ops.mod(plan.place, S))
    query = rotate(query, layer.positions.tokens(plan.place) if plan.in_slots else table)
    key = rotate(key, table)
    keys, values = (
        block_ops.with_segments(held, block_ops.to_blocks(new, S, plan.num_blocks), m, S)
        if plan.aligned
        else block_ops.lay_out(held, new, position.offset, taken, S, plan.num_blocks)
        for held, new in ((state.key, key), (state.value, value))
    )

    memory_key = memory_value = None
    if layer.fam_length:
        every_row = plan.aligned and lengths is None
        written = write_memories(
            layer,
            state,
            position,
            keys[:, m:],
            values[:, m:],
            completed,
            plan,
            every_row=every_row,
            hooks=hooks,
            rider=rider,
        )
        memory_key, memory_value, state, rider = written
    outputs, one_token = None, plan.in_slots and plan.num_blocks == 1
    if layer.segment_source == "outputs" and not one_token:
        tokens = (x, query, keys, values, memory_key, memory_value)
        y, *outputs = read_in_turn(layer, plan, tokens, state, position, taken, hooks, _read_blocks)
    else:
        read = _read_slots if plan.in_slots else _read_blocks
        attended = read(layer, plan, query, keys, values, memory_key, memory_value, position)
        y = hooks.transform(layer.project_output(attended), x, hooks.seed)
    if not keep_state:
        return y, None, rider

    if every_row_equal(plan, lengths, length):
        completed = length // S
    if layer.segment_source == "outputs":
        if outputs is None:
            outputs = lay_out_outputs(layer, y, table, state, position, taken, hooks)
        return y, keep_outputs(layer, state, keys, values, outputs, completed), rider

    def shifted():
        return tuple(block_ops.keep_last(part, completed, m) for part in (keys, values))

    if one_token:  # mostly, no block is filled and nothing moves
        key, value = branch(ops.any(completed > 0), shifted, lambda: tuple(map(block_ops.to_slots, (keys, values))))
    else:
        key, value = shifted()
    return y, state._replace(key=key, value=value), rider


def every_row_equal(plan, lengths, length):
    """Whether all rows fill the same number of blocks, known when the program is made."""
    return plan.aligned and lengths is None and isinstance(length, int)


def _read_blocks(layer, plan, query, keys, values, memory_key, memory_value, position):
    """Whole blocks: a static window, narrowed to what exists. `[B, T, N, H]`."""
    S, segments, num_blocks = layer.block_size, plan.segments, plan.num_blocks
    length = ops.shape(query)[1]
    if plan.aligned:
        query = block_ops.to_blocks(query, S, num_blocks)
    else:
        query = block_ops.place_queries(query, position.offset, S, num_blocks)
    mask = masks.token_window(S, segments, layer.attention_window)
    visible = None
    if segments:
        visible = masks.filled_segments(position.block_index, num_blocks, segments, S)
    if memory_key is not None:
        width = memory_key.shape[2]
        mask = np.concatenate([np.ones((S, width), bool), mask], axis=1)
        rows = None
        if layer.num_visible_memories > 1 or layer.initial_fam == "summary":
            count = ops.expand_dims(position.visible_memories, 1) + ops.arange(num_blocks, dtype="int32")
            rows = masks.visible_memories(count, layer.fam_length, layer.num_visible_memories)
        visible = masks.join(rows, visible, width, (segments + 1) * S)
    skipped = layer.memory_segments - segments
    attended = attend_blocks(
        query,
        keys[:, skipped:],
        values[:, skipped:],
        memory_key,
        memory_value,
        mask,
        segments=segments,
        back=layer.positions.back,
        visible=visible,
        softcap=layer.attention_softcap,
        stop_gradient=layer.stop_memory_gradient,
    )
    if plan.aligned:
        return block_ops.to_slots(attended)[:, :length]
    return block_ops.read_back(attended, position.offset, length)


def _read_slots(layer, plan, query, keys, values, memory_key, memory_value, position):
    """A few tokens anywhere: visibility from each token's place. `[B, T, N, H]`."""
    S, m, place, num_blocks = layer.block_size, layer.memory_segments, plan.place, plan.num_blocks
    visible = masks.slot_visibility(place, position.block_index, m, num_blocks, S, layer.attention_window)
    shape = ops.shape(place)
    mask = ops.reshape(visible, (*shape, (m + num_blocks) * S))
    if memory_key is not None:
        rows = masks.slot_memories(
            place, position.visible_memories, num_blocks, S, layer.fam_length, layer.num_visible_memories
        )
        mask = ops.concatenate([ops.reshape(rows, (*shape, num_blocks * memory_key.shape[2])), mask], axis=-1)
    return attend_slots(
        query,
        keys,
        values,
        memory_key,
        memory_value,
        mask,
        segments=m,
        own=masks.own_block(place, m, num_blocks, S),
        back=layer.positions.back,
        softcap=layer.attention_softcap,
        stop_gradient=layer.stop_memory_gradient,
    )

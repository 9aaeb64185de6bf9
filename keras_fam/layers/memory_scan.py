"""Writing the memory: the scan over completed blocks, memory rows only (Alg. 2, the second half).

A memory row of a layer needs only that layer's keys and values of the block and its own past. So the scan touches F
rows a step and never the tokens; tokens read what it leaves behind, all blocks at once.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_fam.layers.memory_projection import MemoryProjection
from keras_fam.ops import masks
from keras_fam.ops.attention import attend
from keras_fam.ops.backend import indices
from keras_fam.ops.random import fold_in
from keras_fam.ops.rope import rotate
from keras_fam.ops.scan import scan
from keras_fam.state import where_rows


class Memory(NamedTuple):
    """A memory and its projections while blocks are read: the carry of the scan."""

    fam: Any  # [B, F, D], float32 or wider
    residual: Any  # [B, F, D], what the next update adds to; zeros before the first
    query: Any  # [B, F, N, H]
    key: Any  # [B, P·F, K, H], newest memory first
    value: Any  # [B, P·F, K, H]


class WritingRows(NamedTuple):
    """Rows that write the memory in place of the memory itself, one set per completed block."""

    query: Any  # [B, n, F, N, H]
    residual: Any  # [B, n, F, D]


def rows_for_lowest(attention, learned):
    """`rows_below` of the lowest layer of a model, or of a layer that stands alone.

    Args:
        attention: a `FeedbackAttention`.
        learned: function that returns the learned rows, `[1, F, D]`.
    """
    if not attention.fam_length:
        return None
    if attention.rows_come_from_below:
        return ops.expand_dims(learned(), 1)
    return learned() if attention.initial_fam == "summary" else None


def anchored_rows(layer, state, chunk, rows_below):
    """`WritingRows` that are the rows of the layer below in the same block, as query and as residual."""
    attention = layer.attention_layer()
    rows = ops.cast(rows_below, attention.memory_dtype)
    query = attention.memory_query(layer.pre_norm(rows))
    lead = (ops.shape(state.fam)[0], chunk.num_updates)
    return WritingRows(*(ops.broadcast_to(part, (*lead, *part.shape[2:])) for part in (query, rows)))


def memory_ages(attention):
    """NumPy int32 `[P·F]`: of each visible memory row, how many memories were written since."""
    return np.repeat(np.arange(attention.num_visible_memories, dtype="int32"), attention.fam_length)


def scan_memory(layer, state, position, keys, values, chunk, *, seed=None, rows_below=None):
    """Updates the memory once per completed block.

    Args:
        layer: the `RecurrentLayer`.
        state: `LayerState` of B rows.
        position: `StreamPosition` before the chunk.
        keys: `[B, m+n, S, K, H]`, of which the last n blocks are the chunk's, rotated by place in block.
        values: `[B, m+n, S, K, H]`.
        chunk: `Chunk`.
        seed: None, or an integer tensor `[2]`.
        rows_below: see `forward_chunk`.

    Returns:
        `(memory, state, rows_above)`: the keys and values `[B, n, P·F, K, H]` of the memories that the tokens of each
        block read; the `LayerState` with the memory after the last completed block; the rows for the layer above.
    """
    first = _first_memory(layer, state, position, rows_below)
    if isinstance(chunk.num_updates, int) and chunk.num_updates == 0:
        return tuple(ops.expand_dims(part, 1) for part in first[1:]), state, rows_below
    inputs = functools.partial(_scan_inputs, layer, state, position, keys, values, chunk, seed, rows_below)
    sinks = [layer.attention_layer().sinks(state)] if layer.attention_layer().attention_sinks else []
    if isinstance(chunk.num_updates, int) and chunk.num_updates == 1 and not chunk.uniform:
        reads, after, rows_above = _update_once(layer, position, first, inputs, chunk, sinks, rows_below)
    elif layer.attention_layer().fam_query == "layer_inputs" and layer.attention_layer().num_visible_memories == 1:
        reads, after, rows_above = _update_at_once(layer, first, inputs(), chunk, sinks)
    else:
        reads, after, rows_above = _update_in_turn(layer, position, first, inputs(), chunk, sinks)
    if layer.initial_fam == "summary" and chunk.completes is False:
        after = state.fam, state.fam_key, state.fam_value
    elif layer.initial_fam == "summary":
        after = where_rows(chunk.completed > 0, after, (state.fam, state.fam_key, state.fam_value))
    return reads, state._replace(**dict(zip(("fam", "fam_key", "fam_value"), after, strict=True))), rows_above


def _first_memory(layer, state, position, rows_below):
    """`(fam, key, value)` before the chunk: the state's, or `rows_below` in rows that have not completed a block."""
    memory = (state.fam, state.fam_key, state.fam_value)
    if layer.initial_fam != "summary":
        return memory
    attention = layer.attention_layer()
    rows = rows_below[:, 0] if attention.rows_come_from_below else rows_below
    rows = ops.broadcast_to(ops.cast(rows, attention.memory_dtype), ops.shape(state.fam))
    key, value = attention.memory_key_value(layer.pre_norm(rows))
    older = state.fam_key[:, attention.fam_length :]
    key, value = (ops.concatenate([x, ops.zeros_like(older)], axis=1) for x in (key, value))
    return where_rows(position.fresh, (rows, key, value), memory)


def _scan_inputs(layer, state, position, keys, values, chunk, seed, rows_below):
    """What each step of the scan reads, a dict of `[num_updates, …]`."""
    attention, count = layer.attention_layer(), chunk.num_updates
    m, P = attention.memory_segments, attention.num_visible_memories
    index = indices(count)
    inputs = {"key": keys[:, m : m + count], "value": values[:, m : m + count]}
    writing = layer.writing_rows(state, position, chunk, rows_below)
    if writing is not None:
        inputs.update(query=writing.query[:, :count], residual=writing.residual[:, :count])
    inputs = {name: ops.moveaxis(part, 1, 0) for name, part in inputs.items()}
    if not chunk.uniform:
        inputs["active"] = ops.expand_dims(index, 1) < chunk.completed
    if attention.memory_update.takes_first_write:
        inputs["fresh"] = ops.logical_and(ops.expand_dims(index, 1) == 0, position.fresh)
    if P > 1 or attention.attention_sinks:
        age = ops.convert_to_tensor(memory_ages(attention))
        readable = ops.maximum(ops.expand_dims(position.visible_memories, 0) + ops.expand_dims(index, 1), 1)
        visible = masks.memory_visible(ops.expand_dims(readable, -1), age)
        if attention.attention_sinks:  # a row sees its own block alone, so the first tokens leave with the first block
            block = ops.expand_dims(position.block_index, 0) + ops.expand_dims(index, 1)
            sinks = ops.repeat(masks.sink_visible(ops.expand_dims(block, -1), 0), attention.attention_sinks, axis=2)
            visible = ops.concatenate([sinks, visible], axis=2)
        inputs["visible"] = visible
    if seed is not None:
        inputs["seed"] = fold_in(seed, 4 * index + 2)
    return inputs


def _start(layer, position, first, inputs):
    """The carry before the first step, and the projection of new memories."""
    fam, key, value = first
    if "query" in inputs:
        return Memory(fam, (), (), key, value), MemoryProjection(layer.attention_layer(), with_query=False)
    query = layer.attention_layer().memory_query(layer.pre_norm(fam))
    residual = fam
    if layer.initial_fam != "summary":  # the first update after a reset has no residual
        residual = fam * ops.cast(ops.logical_not(position.fresh), fam.dtype)[:, None, None]
    return Memory(fam, residual, query, key, value), MemoryProjection(layer.attention_layer(), with_query=True)


def _write(layer, memory, x, sinks):
    """What the layer makes of rows, `[B, F, D]`: they attend to sinks, memories and the whole block.

    Args:
        layer: the `RecurrentLayer`.
        memory: keys and values of the memory that is read, `[B, P·F, K, H]`.
        x: dict with query and residual of the rows, keys and values of the block, and perhaps visibility and a seed.
        sinks: a list: nothing, or keys and values of the sinks, `[B, W, K, H]`.
    """
    attention = layer.attention_layer()
    key, value = (ops.concatenate(parts, axis=1) for parts in zip(*sinks, memory, (x["key"], x["value"]), strict=True))
    mask = None
    if "visible" in x:
        visible = x["visible"]
        mask = ops.concatenate([visible, ops.ones((ops.shape(visible)[0], attention.block_size), "bool")], axis=1)
        mask = ops.expand_dims(mask, 1)
    attended = attend(x["query"], key, value, mask, **attention.softmax_settings)
    return layer.memory_output(attended, x["residual"], x.get("seed"))


def _update(layer, new, before, x):
    """The memory `[B, F, D]` after a block, from the rows `new` that it brings and the memory before."""
    update = layer.attention_layer().memory_update
    return update.call(new, before, seed=fold_in(x.get("seed"), 3), fresh=x.get("fresh"))


def _step(layer, memory, x, project, sinks):
    """F_τ from F_{τ−1} and one block: attend to sinks, memories and the whole block, write, update, project.

    Returns:
        `(memory, written)`: the new carry, and what the layer made of the rows, `[B, F, D]`.
    """
    attention = layer.attention_layer()
    x = {"query": memory.query, "residual": memory.residual} | x
    written = _write(layer, (memory.key, memory.value), x, sinks)
    fam = _update(layer, x["residual"] if attention.fam_query == "layer_inputs" else written, memory.fam, x)
    query, key, value = project(layer.pre_norm(fam))
    if attention.num_visible_memories > 1:  # older memories move one block back
        kept = (attention.num_visible_memories - 1) * attention.fam_length
        key = ops.concatenate([key, rotate(memory.key[:, :kept], attention.positions.back(1))], axis=1)
        value = ops.concatenate([value, memory.value[:, :kept]], axis=1)
    new = Memory(fam, fam, query, key, value) if query is not None else Memory(fam, (), (), key, value)
    return (where_rows(x["active"], new, memory) if "active" in x else new), written


def _update_once(layer, position, first, inputs, chunk, sinks, rows_below):
    """At most one block is completed, as in decoding: mostly none is, and then nothing of this is computed."""
    anchored, before = layer.attention_layer().rows_come_from_below, first
    if anchored:
        before += (ops.broadcast_to(ops.cast(rows_below[:, 0], first[0].dtype), ops.shape(first[0])),)

    def update():
        x = {name: part[0] for name, part in inputs().items()}
        memory, project = _start(layer, position, first, x)
        new, written = _step(layer, memory, x, project, sinks)
        return (new.fam, new.key, new.value) + ((written,) if anchored else ())

    fam, key, value, *written = chunk.on_completion(update, lambda: before)
    if chunk.num_blocks == 1:
        reads = tuple(ops.expand_dims(part, 1) for part in first[1:])
    else:
        reads = tuple(ops.stack(pair, axis=1) for pair in zip(first[1:], (key, value), strict=True))
    summary = fam if layer.initial_fam == "summary" else None
    return reads, (fam, key, value), ops.expand_dims(written[0], 1) if anchored else summary


def _update_at_once(layer, first, inputs, chunk, sinks):
    """Where a layer remembers its inputs, only the update is sequential: all blocks' rows are projected, attend and are
    written at once."""
    names = ("residual", "active", "fresh", "seed")

    def step(fam, x):
        new = _update(layer, x["residual"], fam, x)
        new = where_rows(x["active"], new, fam) if "active" in x else new
        return new, (new,)

    def merge(x):
        return ops.reshape(x, (-1, *x.shape[2:]))

    fam, (after,) = scan(step, first[0], {name: inputs[name] for name in names if name in inputs}, (first[0],))
    lead = (-1, *ops.shape(first[0])[:1])
    _, *after = MemoryProjection(layer.attention_layer(), with_query=False)(layer.pre_norm(merge(after)))
    after = [ops.reshape(part, (*lead, *part.shape[1:])) for part in after]  # [n, B, F, K, H]
    memories = [ops.concatenate([ops.expand_dims(a, 0), b], axis=0) for a, b in zip(first[1:], after, strict=True)]
    count = ops.shape(inputs["key"])[0]
    x = {name: merge(inputs[name]) for name in ("query", "residual", "key", "value")}
    if "visible" in inputs:
        visible = inputs["visible"]
        x["visible"] = merge(ops.broadcast_to(visible, (count, ops.shape(first[0])[0], visible.shape[2])))
    if "seed" in inputs:
        x["seed"] = inputs["seed"][0]
    sinks = [tuple(ops.tile(part, (count, 1, 1, 1)) for part in pair) for pair in sinks]
    written = _write(layer, [merge(part[:count]) for part in memories], x, sinks)
    last = tuple(part[-1] for part in after)
    if not chunk.uniform:
        last = where_rows(chunk.completed > 0, last, first[1:])
    reads = tuple(ops.moveaxis(part[: chunk.num_blocks], 0, 1) for part in memories)
    return reads, (fam, *last), ops.moveaxis(ops.reshape(written, (*lead, *written.shape[1:])), 0, 1)


def _update_in_turn(layer, position, first, inputs, chunk, sinks):
    """One update after the other; the tokens of each block read what was there before it."""
    memory, project = _start(layer, position, first, inputs)
    anchored = layer.attention_layer().rows_come_from_below
    summary = layer.initial_fam == "summary" and not anchored

    def step(memory, x):
        new, written = _step(layer, memory, x, project, sinks)
        above = (written,) if anchored else (new.fam,) if summary else ()
        return new, (memory.key, memory.value, *above)

    like = (memory.key, memory.value) + ((memory.fam,) if anchored or summary else ())
    memory, stacked = scan(step, memory, inputs, like, unroll=True)
    reads, rows_above = stacked[:2], None
    static = isinstance(chunk.num_updates, int)
    if not static or chunk.num_blocks > chunk.num_updates:  # the unfinished block reads the last memory
        last = (ops.expand_dims(part, 0) for part in (memory.key, memory.value))
        reads = [ops.concatenate(parts, axis=0)[: chunk.num_blocks] for parts in zip(reads, last, strict=True)]
    if anchored:
        rows_above = ops.moveaxis(stacked[2], 0, 1)
    elif summary:  # what block 1 made of the rows passes on to the layer above
        stacked = ops.concatenate([ops.expand_dims(first[0], 0), stacked[2]], axis=0)
        rows_above = stacked[1] if static else stacked[ops.minimum(chunk.num_updates, 1)]
    return tuple(ops.moveaxis(part, 0, 1) for part in reads), (memory.fam, memory.key, memory.value), rows_above
